"""Train a GPT-family model.

`torchrun --nproc-per-node 4 models/gpt/train.py --preset gpt2 --parallel.tp 2 --data.train corpus
--tokenizer tok/ --save DIR`; without torchrun it runs as one process. `--help` lists all options.
"""

from typing import TYPE_CHECKING

from core.config.loading import ModelChoice
from core.config.run import RunConfig, validate_run
from core.config.transformer import TransformerConfig
from core.training.entrypoint import main
from models.gpt.config import PRESETS

if TYPE_CHECKING:
    from core.training.task import TrainTask

CHOICE = ModelChoice(presets=PRESETS, default="gpt-tiny", validate=validate_run)


def gpt_task(config: RunConfig[TransformerConfig]) -> "TrainTask":
    """The family's part in training. Imports torch, which `--help` does without."""
    from core.training.language_model_task import LanguageModelTask
    from models.gpt.convert import import_weights
    from models.gpt.model import build_gpt

    return LanguageModelTask.of("gpt", config, build=build_gpt, importer=import_weights)


if __name__ == "__main__":
    main(CHOICE, gpt_task, prog="models/gpt/train.py")
