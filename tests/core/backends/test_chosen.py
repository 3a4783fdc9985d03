import importlib.util

import pytest

from core.backends.chosen import chosen_backend
from core.backends.local import LocalSpecProvider
from core.backends.transformer_engine import TransformerEngineSpecProvider
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.errors import ConfigError
from core.testing.fake_transformer_engine import installed


def test_local_needs_nothing() -> None:
    assert chosen_backend("local", PrecisionConfig(), ParallelConfig(), 4) == LocalSpecProvider()


def test_transformer_engine_gets_what_concerns_it() -> None:
    precision = PrecisionConfig(fp8="delayed", fp8_bf16_first_layers=1, fp8_bf16_last_layers=2)
    with installed():
        for schedule, splits in (("1f1b", False), ("zb_h1", True), ("zbv", True)):
            parallel = ParallelConfig(pp=2, schedule=schedule)  # type: ignore[arg-type]
            assert chosen_backend(
                "transformer_engine", precision, parallel, 8
            ) == TransformerEngineSpecProvider(8, "delayed", 1, 2, split_backward=splits)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="it is installed"
)
def test_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"not installed: `pip install 'tessera-zoo\[te\]'`"):
        chosen_backend("transformer_engine", PrecisionConfig(), ParallelConfig(), 4)
