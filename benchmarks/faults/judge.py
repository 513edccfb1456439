"""Whether a federation kept its promises: nothing acknowledged is lost, nothing counts twice, averages are right."""

from __future__ import annotations

import signal
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.evidence import Training, ended_without, files_by_digest, told, trainings
from benchmarks.faults.federation import Federation
from fedepth.aggregation.aggregate import aggregate
from fedepth.aggregation.rules import WeightedMean
from fedepth.aggregation.updates import ClientUpdate
from fedepth.errors import FedepthError

# Any other way to end is a surprise: 0 done, 1 with a sentence on standard error, 2 for a command line that is wrong.
DOCUMENTED = (0, 1, 2, 128 + signal.SIGTERM)  # fedepth.program; what we end while it starts says 143
SENTENCES = ("fedepth-coordinator: ", "fedepth-client: ")


@dataclass
class Verdict:
    """What was found, one sentence each.

    Attributes:
        compared: rounds whose average was computed again.
        equal: those of them that were equal bit for bit.
        wasted: trainings that are in no record, each with the time when it began and the reason.
    """

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    discarded: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    compared: int = 0
    equal: int = 0
    wasted: list[tuple[float, str]] = field(default_factory=list)


class Judge:
    """Judges one federation, again and again as it goes on; says everything once."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._said: set[str] = set()
        self._rounds: set[tuple[int, str]] = set()
        self._exits: Counter[str] = Counter()
        self.excused: set[str] = set()  # tasks whose update was damaged on purpose

    def look(self) -> Verdict:
        """What has become known since the last look.

        Raises:
            FedepthError: the record cannot be read.
        """
        verdict = Verdict()
        federation = self._federation
        answers = [each for device in federation.devices for each in told(federation, device)]
        done = [each for device in federation.devices for each in trainings(federation, device)]
        record = federation.record()  # after the answers: it must know all of them
        updates = {each["result"]["task_id"]: each["result"] for each in record["updates"]}
        for answer in answers:
            if not answer.accepted or answer.task in self.excused:
                continue
            held = updates.get(answer.task)
            if held is None:
                self._say(
                    verdict.lost, f"{answer.device}: task {answer.task} was acknowledged and is not in the record"
                )
            elif answer.attempt and not _same(held, answer.attempt, done, answer.device):
                self._say(
                    verdict.discarded,
                    f"{answer.device}: attempt {answer.attempt} of task {answer.task} was acknowledged, "
                    f"attempt {held['attempt']} is recorded",
                )
        self._count_doubles(verdict, record)
        self._compare_rounds(verdict, record)
        self._look_at_exits(verdict)
        return verdict

    def wasted(self) -> list[tuple[float, str]]:
        """Trainings that are in no record; for when the job is over."""
        federation = self._federation
        recorded = {
            (each["result"]["task_id"], tuple(part["digest"] for part in each["result"]["parts"]))
            for each in federation.record()["updates"]
        }
        tasks = {task for task, _ in recorded}
        found = []
        for device in federation.devices:
            refused = {each.task: each.reason for each in told(federation, device) if not each.accepted}
            given_up = ended_without(federation, device)
            kills = [each.at for each in federation.managed[device].exits if each.status < 0]
            for training in trainings(federation, device):
                if (training.task, training.digests) not in recorded:
                    reason = _reason(training, tasks, refused, given_up, kills)
                    found.append((training.at, f"{device}, task {training.task}: {reason}"))
        return found

    def unmade(self) -> list[tuple[float, str]]:
        """Rounds whose accuracy was never made, with the time of their end; for when the job is over."""
        return [
            (each["closed_at"], f"the accuracy of round {each['round']} was never made")
            for each in self._federation.record()["rounds"]
            if each["round"] and each["published"] and each["accuracy"] is None
        ]

    def _count_doubles(self, verdict: Verdict, record: Mapping[str, Any]) -> None:
        results = [each["result"] for each in record["updates"]]
        keys = Counter(("task", each["task_id"]) for each in results)
        keys += Counter(("round and device", f"{each['round']} {each['device_id']}") for each in results)
        keys += Counter(("parts", str(sorted(part["digest"] for part in each["parts"]))) for each in results)
        for (kind, key), times in keys.items():
            if times > 1:
                self._say(verdict.doubled, f"{times} updates are recorded with {kind} {key}")

    def _compare_rounds(self, verdict: Verdict, record: Mapping[str, Any]) -> None:
        """Computes each new round's average again, from the updates in the record and the weights before it."""
        new = [each for each in record["rounds"] if (each["round"], each["digest"]) not in self._rounds]
        if not new:
            return
        files = files_by_digest(self._federation)
        digests = {each["round"]: each["digest"] for each in record["rounds"]}
        for each in new:
            number = each["round"]
            aside = each["published"] or each["aside_digest"]
            if number == 0 or number - 1 not in digests or not aside:
                self._rounds.add((number, each["digest"]))
                continue
            results = [one["result"] for one in record["updates"] if one["result"]["round"] == number]
            wanted = [digests[number - 1], *(part["digest"] for result in results for part in result["parts"])]
            missing = [digest[:12] for digest in wanted if digest not in files]
            self._rounds.add((number, each["digest"]))
            if missing:
                self._say(verdict.failures, f"round {number} cannot be computed again: {missing} are not archived")
                continue
            verdict.compared += 1
            again = _average_again(files, digests[number - 1], results)
            published = each["digest"] if each["published"] else each["aside_digest"]
            if again != published and (rest := [one for one in results if one["task_id"] not in self.excused]):
                again = _average_again(files, digests[number - 1], rest)  # what was damaged on purpose is left out
            if again == published:
                verdict.equal += 1
            else:
                self._say(verdict.failures, f"round {number} is not the average of its {len(results)} recorded updates")

    def _look_at_exits(self, verdict: Verdict) -> None:
        for name, managed in self._federation.managed.items():
            new = managed.exits[self._exits[name] :]
            self._exits[name] += len(new)
            for each in new:
                tail = each.said[-300:].replace("\n", " | ")
                if each.status < 0 and -each.status not in (signal.SIGKILL, signal.SIGTERM):
                    verdict.unexpected.append(f"{name} was ended by signal {-each.status}: {tail}")
                elif each.status >= 0 and each.status not in DOCUMENTED:
                    verdict.unexpected.append(f"{name} ended with status {each.status}: {tail}")
                elif each.status == 1 and not any(sentence in each.said for sentence in SENTENCES):
                    verdict.unexpected.append(f"{name} ended with status 1 and no sentence: {tail}")

    def _say(self, where: list[str], what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            where.append(what)


def _same(held: Mapping[str, Any], attempt: int, done: list[Training], device: str) -> bool:
    """Whether the recorded update is the one that this device had in its outbox."""
    digests = tuple(part["digest"] for part in held["parts"])
    mine = [each for each in done if (each.device, each.task, each.attempt) == (device, held["task_id"], attempt)]
    if not any(each.digests for each in mine):  # of a real trainer
        return bool(held["attempt"] == attempt)
    return any(each.digests == digests for each in mine)


def _reason(
    training: Training, recorded: set[str], refused: Mapping[str, str], given_up: Mapping[str, str], kills: list[float]
) -> str:
    if not training.digests:
        return "the trainer ended before it was done"
    if training.task in refused:
        return f"refused: {refused[training.task]}"
    if training.task in given_up:
        return given_up[training.task]
    if training.task in recorded:
        killed = any(0 <= at - training.at < 30 for at in kills)
        return "another training of the task is recorded" + (", after its agent was killed" if killed else "")
    if any(at >= training.at for at in kills):
        return "its agent was killed before it was kept"
    return "no reason was found"


def _average_again(files: Mapping[str, Path], base: str, results: list[Mapping[str, Any]]) -> str:
    """The sha256 of the weights that these updates give, in the order that the coordinator takes them in."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        updates = []
        for result in results:
            spool = folder / "spool" / f"{result['task_id']}-{result['attempt']}"
            spool.mkdir(parents=True)
            parts = []
            for part in result["parts"]:
                path = spool / f"part-{part['part']:04d}.safetensors"
                path.symlink_to(files[part["digest"]])
                parts.append(path)
            updates.append(ClientUpdate(tuple(parts), float(result["sample_count"])))
        try:
            return aggregate(files[base], updates, folder / "again.safetensors", WeightedMean()).digest
        except FedepthError as error:
            return str(error)
