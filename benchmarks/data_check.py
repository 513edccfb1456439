"""What a look at a device's image files costs: `python -m benchmarks.data_check [--files N] [--json FILE]`.

Images of 640×480 pixels in the formats that people have. Times are of the processor, which other load on the machine
leaves about as they are; reading from a disk comes on top. "looked" is the check before training, which opens files and
looks at their ends; "decoded" is what it does where the end of a file says nothing, or after damage was found that only
decoding shows.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from fedepth.data.check import check_data
from fedepth.data.scan import scan

SIZE = (640, 480)
FORMATS = ("jpg", "png", "webp", "tif")


@dataclass(frozen=True)
class Cost:
    """Microseconds of the processor for one file.

    Attributes:
        counted: by a scan, which an agent repeats after every task.
        looked: by the first check; a file that has not changed is not looked at again.
        decoded: by a check that decodes.
    """

    format: str
    file_bytes: int
    counted_us: float
    looked_us: float
    decoded_us: float


def measure(folder: Path, end: str, files: int) -> Cost:
    """The costs of `files` copies of one image in a folder."""
    data = folder / end
    (data / "class").mkdir(parents=True)
    noise = np.random.default_rng(1).integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3)).astype(np.uint8)
    first = data / "class" / f"0.{end}"
    Image.fromarray(noise).resize(SIZE).save(first)
    content = first.read_bytes()
    for number in range(1, files):
        first.with_name(f"{number}.{end}").write_bytes(content)

    def microseconds(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return round((time.process_time() - start) / files * 1e6, 1)

    return Cost(
        end,
        len(content),
        counted_us=microseconds(lambda: scan(data, None)),
        looked_us=microseconds(lambda: check_data(data, folder / f"{end}-looked")),
        decoded_us=microseconds(lambda: check_data(data, folder / f"{end}-decoded", decode=True)),
    )


def main(
    files: Annotated[int, typer.Option(min=1, help="Images of each format.")] = 200,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
) -> None:
    """Measures what counting, looking at and decoding image files takes of the processor."""
    with tempfile.TemporaryDirectory() as folder:
        costs = [measure(Path(folder), end, files) for end in FORMATS]
    for cost in costs:
        typer.echo(
            f"{cost.format:5} {cost.file_bytes / 1e3:6.0f} kB: counted {cost.counted_us:6.1f} us, "
            f"looked at {cost.looked_us:7.1f} us, decoded {cost.decoded_us:8.1f} us"
        )
    if json_file is not None:
        json_file.write_text(json.dumps({"files": files, "size": SIZE, "costs": [asdict(cost) for cost in costs]}))


if __name__ == "__main__":
    typer.run(main)
