"""Train a Llama-family model.

`torchrun --nproc-per-node 4 models/llama/train.py --preset llama3.2-1b --parallel.tp 2 --data.train
corpus --tokenizer tok/ --save DIR`; without torchrun it runs as one process. `--help` lists all
options.
"""

from typing import TYPE_CHECKING

from core.config.loading import ModelChoice
from core.config.run import RunConfig, validate_run
from core.config.transformer import TransformerConfig
from core.training.entrypoint import main
from models.llama.config import PRESETS

if TYPE_CHECKING:
    from core.training.task import TrainTask

CHOICE = ModelChoice(presets=PRESETS, default="tiny", validate=validate_run)


def llama_task(config: RunConfig[TransformerConfig]) -> "TrainTask":
    """The family's part in training. Imports torch, which `--help` does without."""
    from core.training.language_model_task import LanguageModelTask
    from models.llama.convert import import_weights
    from models.llama.model import build_llama

    return LanguageModelTask.of("llama", config, build=build_llama, importer=import_weights)


if __name__ == "__main__":
    main(CHOICE, llama_task, prog="models/llama/train.py")
