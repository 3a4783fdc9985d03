"""`python -m core.pipeline show`: what a pipeline schedule does, before any process starts."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from core.config.loading import exit_on_user_error, one_sentence
from core.errors import ConfigError
from core.pipeline.costs import Part, Work
from core.pipeline.draw import picture, text_timeline
from core.pipeline.fastest import fastest
from core.pipeline.layout import Layout, balanced, expand_layout, parse_layout
from core.pipeline.schedules import SCHEDULES, make_schedule, stage_map_for
from core.pipeline.simulate import Costs, Simulation, Timeline, bubble_of, simulate, span_of
from core.pipeline.stage_map import StageMap
from core.pipeline.trace import first_deviation, measured_transfer, measured_work, read_trace


@dataclass(frozen=True, kw_only=True)
class Show:
    """Simulate a schedule: bubble, activations kept, timeline."""

    schedule: str
    """gpipe, 1f1b, interleaved, zb_h1 or zbv."""
    stages: int
    """Pipeline stages."""
    microbatches: int
    """Microbatches of one step."""
    chunks: int | None = None
    """Pieces of the model on each stage (virtual stages); by default the fewest that the schedule
    takes."""
    costs: str | None = None
    """Times of forward, input gradient and weight gradient, such as 1,1,1: of a layer if there is a
    layout, else of a piece. By default 1,1,1, or what was measured with --from-trace."""
    transfer: float | None = None
    """Time of a message between two stages. By default 0, or what was measured with
    --from-trace."""
    layout: str | None = None
    """Parts of each piece, such as 'E t*3|t*3|t*2|L'. L is head and loss, the embedding E takes no
    time, every other letter is a layer."""
    layers: int | None = None
    """Layers t of the model. Without --layout, embedding, layers and head are cut so that the
    simulated step is short."""
    head_cost: float | None = None
    """With a layout: time of head and loss, in layers; 1 by default."""
    from_trace: Path | None = None
    """Draw a measured timeline beside it (the format is in core/pipeline/trace.py). Without
    --costs, a --layout then only says which pieces are empty."""
    out: Path | None = None
    """Draw a picture (.png, .pdf, .svg) in place of text; needs matplotlib."""

    def run(self) -> None:
        """Simulate, print, draw.

        Raises:
            ConfigError: options that cannot work.
            DataError: the trace is unreadable or of another schedule.
        """
        where = stage_map_for(self.schedule, self.stages, self.chunks)
        layout = self._layout(where)
        schedule = make_schedule(
            self.schedule,
            stages=self.stages,
            microbatches=self.microbatches,
            chunks=where.chunks,
            trainable=layout.trainable if layout else None,
        )
        measured = read_trace(self.from_trace, schedule) if self.from_trace else None
        by_trace = measured if self.costs is None else None
        work: tuple[Work, ...] | Work
        transfer = self.transfer or 0.0
        if by_trace:
            work = measured_work(by_trace, schedule)
            if self.transfer is None:
                transfer = measured_transfer(by_trace, schedule)
        elif layout:
            work = layout.work
        else:
            work = self._layer_work()
        if not 0 <= transfer < math.inf:
            raise ConfigError(f"--transfer is {transfer}: it must be finite and at least 0")
        result = simulate(schedule, Costs(work=work, transfer=transfer))
        if not result.makespan:
            raise ConfigError("nothing here takes any time: give --costs or a --head-cost above 0")
        timelines = {f"{self.schedule}, simulated": result.timeline}
        if measured:
            timelines[f"{self.schedule}, measured in ms"] = measured
        if self.out:
            picture(self.out, timelines)
        if layout and not by_trace:  # which does not tell what each part takes
            print(layout.table(parameters=False), end="\n\n")
        print(report(result))
        if measured:
            print(compare(result, measured))
        if self.out:
            print(f"drawn: {self.out}")
            return
        width = max(40, shutil.get_terminal_size((160, 24)).columns - 4)
        for title, timeline in timelines.items():
            print(f"\n{title}\n{text_timeline(timeline, width)}")
        print("F forward, B backward, I input and W weight gradient; small letters: odd chunks")

    def _layer_work(self) -> Work:
        """The times of --costs."""
        text = "1,1,1" if self.costs is None else self.costs
        try:
            forward, backward_input, backward_weight = map(float, text.split(","))
        except ValueError:
            raise ConfigError(
                f"--costs {text} must be three numbers with commas between: forward, input "
                "gradient and weight gradient, such as 1,1,1"
            ) from None
        work = Work(forward, backward_input, backward_weight)
        if not all(0 < cost < math.inf for cost in (forward, backward_input, backward_weight)):
            raise ConfigError(f"--costs {text}: each number must be finite and above 0")
        return work

    def _layout(self, where: StageMap) -> Layout | None:
        if self.layout is None and self.layers is None:
            if self.head_cost is not None:
                raise ConfigError("--head-cost does nothing without --layout or --layers")
            return None
        head = 1.0 if self.head_cost is None else self.head_cost
        if not 0 <= head < math.inf:
            raise ConfigError(f"--head-cost is {head}: it must be finite and at least 0")
        if self.layers is not None and self.layers < 1:
            raise ConfigError(f"--layers is {self.layers}: it must be at least 1")
        if self.layers is not None:
            letters = f"E{'t' * self.layers}L"
        else:
            letters = expand_layout(self.layout or "").replace("|", "")
        layer = self._layer_work()
        times = {
            "E": Work(),
            "L": Work(
                *(head * t for t in (layer.forward, layer.backward_input, layer.backward_weight))
            ),
        }
        parts = [
            Part(symbol=letter, name=letter, work=times.get(letter, layer), parameters=1)
            for letter in letters
        ]
        if self.layout is None:
            return fastest(balanced(parts, where), self.schedule, self.microbatches)
        return parse_layout(self.layout, parts, where)


def report(result: Simulation) -> str:
    """Bubble and memory of a simulation as text."""
    schedule, where = result.schedule, result.schedule.stage_map
    rows = [("stage", "busy", "live activations")]
    for stage, entries in enumerate(result.timeline):
        busy = sum(entry.end - entry.start for entry in entries)
        rows.append((str(stage), f"{busy / result.makespan:.1%}", str(result.peak_live[stage])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(c.rjust(n) for c, n in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(
        [
            f"{schedule.name}: {SCHEDULES[schedule.name].summary}",
            f"{where.stages} stages of {where.chunks} chunks, {schedule.microbatches} microbatches",
            f"bubble {result.bubble:.2%}, time {result.makespan:g}, at most "
            f"{max(result.peak_live)} live activations (microbatches times pieces) and "
            f"{max(result.peak_messages.values(), default=0)} messages in flight per edge",
            *table,
        ]
    )


def compare(result: Simulation, measured: Timeline) -> str:
    """A measured timeline against a simulated one, as text."""
    start, end = span_of(measured)
    deviation = first_deviation(measured, result.schedule)
    return f"measured: bubble {bubble_of(measured):.2%}, {end - start:.3f} ms; " + (
        f"order differs: {deviation}" if deviation else "in the schedule's order"
    )


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: arguments; by default the command line's.

    Raises:
        SystemExit: bad options, or a trace that cannot be read.
    """
    prog = "python -m core.pipeline"
    with one_sentence():
        command: Show = tyro.extras.subcommand_cli_from_dict({"show": Show}, args=argv, prog=prog)
    command.run()


if __name__ == "__main__":
    main()
