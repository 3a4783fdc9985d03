import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core.checkpoint.__main__ import main
from core.checkpoint.index import SavedTensor
from core.checkpoint.writer import write_checkpoint

MakeShards = Callable[..., list[list[SavedTensor]]]


@pytest.fixture
def saved(tmp_path: Path, make_shards: MakeShards) -> Path:
    sections = {
        "config": {"hidden_size": 8},
        "run": "save = 'x'\n\n[train]\nsteps = 3\n",
        "train_state": {"step": 3, "consumed_samples": 24},
    }
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return write_checkpoint(
        tmp_path / "run", 3, make_shards(2), sections, assets=tmp_path / "source"
    )


def test_inspect_lists_what_is_there(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(saved.parent), "--verify"])
    out = capsys.readouterr().out
    assert "step 3, 12 tensors in 3 files, 0.0 MiB" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["model/qkv", "32x8", "bfloat16", "6", "boxes", "in", "2", "files"] in rows
    assert ["optim/master/scale", "scalar", "float32", "1", "box", "in", "1", "file"] in rows
    for name in ("hf/tokenizer.json", "rank_00000.safetensors", "rank_00001.safetensors"):
        assert [name, "0.0", "MiB"] in rows
    assert "model: 0.0 MiB of bfloat16" in out
    assert "optim/master: 0.0 MiB of float32" in out
    assert '"consumed_samples": 24' in out
    assert '"hidden_size": 8' in out
    assert "\nrun:\n  save = 'x'\n\n  [train]\n  steps = 3\n" in out
    assert "verified" in out


def test_damage_ends_with_one_sentence_and_a_status(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved / "rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    main(["inspect", str(saved)])  # only --verify reads the bodies
    with pytest.raises(SystemExit) as left:
        main(["inspect", str(saved), "--verify"])
    assert left.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "rank_00001.safetensors is damaged" in error
    assert len(error.strip().splitlines()) == 1


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys; sys.argv = ['x', 'inspect', '--help']\n"
        "from core.checkpoint.__main__ import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--verify" in done.stdout
