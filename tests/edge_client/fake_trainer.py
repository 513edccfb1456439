"""A trainer child that speaks the protocol and trains nothing: `python fake_trainer.py SCENES JOURNAL`.

SCENES is a JSON list with what to do at each request, counted over restarts by the lines of JOURNAL, where
every request is written down. The last scene repeats.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

START_BYTES = 10 << 20


def tell(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def stage_started(plan: dict[str, Any]) -> None:
    stage = plan["stages"][0]
    peak = sum(stage["predicted"].values())
    tell(
        event="stage_started",
        stage=0,
        stage_count=len(plan["stages"]),
        first=stage["first"],
        last=stage["last"],
        predicted_peak_bytes=peak,
    )


def stage_result(stage: dict[str, Any], peak: int) -> dict[str, Any]:
    """Two steps of four samples in all, half a second, and a rehearsal that took one byte less."""
    return {
        "first": stage["first"],
        "last": stage["last"],
        "micro_batch": stage["micro_batch"],
        "predicted_peak_bytes": sum(stage["predicted"].values()),
        "rehearsed_peak_bytes": peak - 1,
        "measured_peak_bytes": peak,
        "measured_anonymous_bytes": peak,
        "budget_bytes": 0,
        "loss_first": 2.0,
        "loss_last": 1.0,
        "steps": 2,
        "samples_seen": 4,
        "seconds": 0.5,
    }


def write_part(request: dict[str, Any]) -> dict[str, Any]:
    content = b"trained"
    output = Path(request["output"])
    output.mkdir(parents=True, exist_ok=True)
    path = output / "part-0000.safetensors"
    if not path.exists():  # a part is final once it was told of: the agent may be reading it
        path.write_bytes(content)
    return {"part": 0, "size_bytes": len(content), "digest": hashlib.sha256(content).hexdigest()}


def write_peers(request: dict[str, Any]) -> None:
    """Every peer goes on with one more line: the task that it has been through."""
    folder = Path(request["peers_output"])
    folder.mkdir(parents=True, exist_ok=True)
    for slot in range(1, request["plan"]["models"]):
        given = request["peers"][slot - 1]
        content = (Path(given).read_bytes() if given else b"new\n") + f"{request['task']['task_id']}\n".encode()
        digest = hashlib.sha256(content).hexdigest()
        (folder / f"{slot}-{digest}.safetensors").write_bytes(content)


def write_left_out(request: dict[str, Any]) -> None:
    """What is left out has one more line: the task whose update left it out."""
    if not request["left_out_output"]:
        return
    folder = Path(request["left_out_output"])
    folder.mkdir(parents=True, exist_ok=True)
    content = b"".join(Path(path).read_bytes() for path in request["left_out"])
    content += f"{request['task']['task_id']}\n".encode()
    (folder / f"1-{hashlib.sha256(content).hexdigest()}.safetensors").write_bytes(content)


def trained(request: dict[str, Any], peak: int = 0) -> dict[str, Any]:
    """The result, left beside its part. `peak`: what every stage took; 0 leaves the stages out."""
    part = write_part(request)
    write_peers(request)
    write_left_out(request)
    task, plan = request["task"], request["plan"]
    result = {
        "task_id": task["task_id"],
        "attempt": task["attempt"],
        "device_id": request["device_id"],
        "round": task["round"],
        "sample_count": 6,
        "plan": plan,
        "trained_units": [0],
        "stages": [stage_result(stage, peak) for stage in plan["stages"]] if peak else [],
        "parts": [part],
        "seconds": 0.5,
        "allocator": "fake 1",
        "baseline_bytes": START_BYTES,
        "weights_digest": task["weights_digest"],
    }
    path = Path(request["output"]) / "result.json"
    path.with_name("new").write_text(json.dumps(result))
    path.with_name("new").rename(path)  # all of it at once, as the real one does: tests look at it meanwhile
    return result


def failed(outcome: str, **more: int) -> None:
    tell(event="failed", outcome=outcome, message=f"said {outcome}", **more)


def play(scene: dict[str, Any], request: dict[str, Any], journal: Path) -> None:
    kind = scene["do"]
    if kind in ("die_rehearsing", "hang_rehearsing"):
        tell(event="rehearsing")
    if kind in ("die", "die_rehearsing"):
        os.kill(os.getpid(), 11)
    if kind == "hang_rehearsing":
        sys.stdin.readline()
        sys.exit()
    stage_started(request["plan"])
    if kind == "hang":
        sys.stdin.readline()
        sys.exit()
    if kind == "babble":
        print("not JSON", flush=True)
    elif kind == "over":
        failed("over_budget", stage=0, miss_bytes=scene["miss"], capped=scene.get("capped", False))
    elif kind == "fail":
        causes = {cause: scene.get(cause, False) for cause in ("damaged", "peers")}
        failed(scene["outcome"], needed_bytes=7, budget_bytes=5, **causes)
    elif kind == "disk":
        failed("error", disk=True, disk_bytes=scene.get("bytes", 0))
    else:
        if kind == "block":
            tell(event="stage_done", result=stage_result(request["plan"]["stages"][0], 1), part=write_part(request))
        if kind in ("measure", "block"):
            tell(
                event="measure",
                stage=0,
                held_bytes=scene["held"],
                baseline_bytes=scene.get("baseline", START_BYTES),
                baseline_anonymous_bytes=scene.get("baseline_anonymous", START_BYTES),
            )
            with open(journal.with_suffix(".answers"), "a") as file:
                file.write(sys.stdin.readline())
        result = trained(request, scene.get("peak", 0))
        if kind == "die_trained":
            os.kill(os.getpid(), 9)
        if kind == "hang_trained":
            sys.stdin.readline()
            sys.exit()
        tell(event="done", result=result)


def main() -> None:
    scenes, journal = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    journal.touch()
    tell(event="ready", start_bytes=START_BYTES, allocator="fake 1")
    for line in sys.stdin:
        request = json.loads(line)
        number = len(journal.read_text().splitlines())
        with open(journal, "a") as file:
            file.write(json.dumps({"pid": os.getpid(), **request}) + "\n")
        play(scenes[min(number, len(scenes) - 1)], request, journal)


main()
