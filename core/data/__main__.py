"""`python -m core.data show`: a sample as training sees it, the tokens that are learnt marked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro

from core.config.data import DataConfig
from core.config.loading import exit_on_user_error, one_sentence
from core.errors import ConfigError

if TYPE_CHECKING:
    from core.data.samples import Array, Sample
    from core.data.tokenizers import Tokenizer

OPEN, CLOSE = "⟦", "⟧"
"""Stand around what is learnt."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """Print a sample of a training run's data, with the tokens that its loss counts in ⟦ ⟧."""

    tokenizer: str
    """As for training: a folder, a file, a Hugging Face Hub id, or `byte`."""
    data: DataConfig = field(default_factory=DataConfig)
    """As for training. Sample indices and rendered chats are kept as there."""
    split: Literal["train", "valid"] = "train"
    """Which set."""
    index: int = 0
    """Which sample, from 0, in the order in which they are read."""
    samples: int | None = None
    """Samples that the run reads, by default index + 1: if that takes a corpus several times, the
    order depends on it."""
    seed: int = 1234
    """As --train.seed."""

    def run(self) -> None:
        """Build the data set and print.

        Raises:
            ConfigError: options that cannot work, or no such sample.
            DataError: data that cannot be read.
        """
        from core.data.builder import build_datasets
        from core.data.tokenizers import load_tokenizer

        if self.index < 0:
            raise ConfigError(f"--index is {self.index}: it must be at least 0")
        tokenizer = load_tokenizer(self.tokenizer)
        count = max(self.samples or 0, self.index + 1)
        counts = {"train": (count, 0, 0), "valid": (0, count, 0)}[self.split]
        datasets = build_datasets(
            self.data,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod if self.data.mask_eod_loss else None,
            num_samples=counts,
            seed=self.seed,
            tokenizer=tokenizer,
        )
        dataset = next(found for found in datasets if found is not None)
        print(f"sample {self.index} of {len(dataset):,} of the {self.split} set: ", end="")
        print("\n".join(describe(dataset[self.index], tokenizer)))


def describe(sample: "Sample", tokenizer: "Tokenizer") -> Iterator[str]:
    """Lines about a sample: how much is learnt of it, then its documents."""
    s, mask = len(sample["tokens"]), sample["loss_mask"]
    bounds = sample.get("cu_seqlens", np.array([0, s])).tolist()
    documents = "1 document" if len(bounds) == 2 else f"{len(bounds) - 1} documents"
    yield f"{s} tokens, {int(mask.sum())} of them learnt, in {documents}"
    for number, (first, end) in enumerate(pairwise(bounds), 1):
        counted = np.flatnonzero(mask[first:end])
        # After the last token that counts there is padding, or nothing that matters.
        length = int(counted[-1]) + 1 if len(counted) else 0
        if length:
            yield f"--- document {number}: {_tokens(length + 1)}, {len(counted)} of them learnt"
            at = slice(first, first + length)
            text = np.concatenate((sample["tokens"][first : first + 1], sample["labels"][at]))
            yield _marked(text, np.concatenate(([False], mask[at])), tokenizer)
        if length < end - first:
            yield f"--- then {_tokens(end - first - length)} that nothing is learnt from"


def _tokens(count: int) -> str:
    return f"{count} token" + "s" * (count != 1)


def _marked(tokens: "Array", learnt: "Array", tokenizer: "Tokenizer") -> str:
    # Some tokenizers give an end no text. Whether it is learnt must be seen all the same.
    silent = {end for end in (tokenizer.eos,) if end is not None and not tokenizer.decode([end])}
    pairs = zip(tokens.tolist(), learnt.tolist(), strict=True)
    parts, read, done = [], [], ""
    for (is_learnt, is_silent), run in groupby(pairs, lambda one: (one[1], one[0] in silent)):
        new = [token for token, _ in run]
        read += new
        # With what stands before: alone, many tokenizers' text would lose the space at its start.
        whole = tokenizer.decode(read)
        text = "".join(f"<{token}>" for token in new) if is_silent else whole[len(done) :]
        parts.append(f"{OPEN}{text}{CLOSE}" if is_learnt else text)
        done = whole
    return "".join(parts).replace(CLOSE + OPEN, "")


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: arguments; by default the command line's.

    Raises:
        SystemExit: bad options, or data that cannot be read.
    """
    with one_sentence():
        command: Show = tyro.extras.subcommand_cli_from_dict(
            {"show": Show}, args=argv, prog="python -m core.data"
        )
    command.run()


if __name__ == "__main__":
    main()
