"""A whole simulation: rounds in order, each trained by workers, averaged, evaluated and recorded.

The evaluation of a round is done beside the training of the next, by workers that would have nothing to do otherwise.
Should it find that the round's weights are not to be published, the next round is trained again from those before.
Not where clients keep something for themselves (fedepth.peers, fedepth.residuals): that would come of weights that
never were in force.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from fedepth import evaluation
from fedepth.aggregation.combine import combine
from fedepth.aggregation.norms import too_far, update_norms
from fedepth.aggregation.rules import Norms, PrivateMean, Rule
from fedepth.errors import (
    ChildError,
    DamagedUpdateError,
    DiskError,
    FedepthError,
    JobError,
    NotFiniteError,
    PlanError,
    StateError,
)
from fedepth.job import aggregation_rule, model_spec, policy, training_spec
from fedepth.layout import Encoding
from fedepth.models.traced import read_costs
from fedepth.peers import peers_folder
from fedepth.plan import Plan
from fedepth.planning.planner import estimated_work, make_plan, smallest_peak
from fedepth.planning.shared import Question, SharedPlanner, question
from fedepth.planning.smaller import SMALLER_PLANS, smaller_limit
from fedepth.residuals import Residuals, residuals_folder
from fedepth.rounds.machine import Rules
from fedepth.rounds.soundness import Evaluation, objection
from fedepth.simulation.clients import EVERYTHING, Client
from fedepth.simulation.course import Given, Played, Round
from fedepth.simulation.engine import Engine
from fedepth.simulation.lines import round_line
from fedepth.simulation.progress import Reporter
from fedepth.simulation.record import PEERS, RESIDUALS, RoundLine, part_paths
from fedepth.simulation.setup import Simulation, as_error, result_of
from fedepth.simulation.worker.protocol import RESULT, Evaluate, Open, Train
from fedepth.task import Failure, Outcome, Result, Task, TrainingSpec

EVALUATED_AT_ONCE = 4  # batches of test data in one request: small enough to fill gaps
_UNLIMITED = 1 << 62  # for plans that are trained whatever is free


@dataclass(frozen=True)
class InForce:
    """Global weights, the round that they are of, and their accuracy; None where it is not known."""

    path: Path
    digest: str
    round: int
    accuracy: float | None


@dataclass
class Closing:
    """A round that is averaged and not recorded yet.

    Attributes:
        new: its weights; None where they could not be made, for the reason in `note`.
        evaluated: what they do on the test data, some time from now.
    """

    number: int
    played: Played
    before: InForce
    new: InForce | None
    note: str
    notes: tuple[str, ...]
    began_at: float
    seconds: float
    evaluated: asyncio.Task[tuple[Evaluation | None, str]]


class Run:
    """The rounds of one simulation."""

    def __init__(self, simulation: Simulation, engine: Engine, reporter: Reporter) -> None:
        self._simulation = simulation
        self._engine = engine
        self._reporter = reporter
        self._config = simulation.config
        self._record = simulation.record
        self._tables = read_costs(simulation.record.folder / "graph.json")
        self._planner = SharedPlanner(self._tables, policy(self._config))
        self._answers: dict[Question, Plan | PlanError] = {}
        self._works: dict[tuple[Question, bool], float] = {}
        self._clients = {client.id: client for client in simulation.clients}
        self._tests = 0  # test images
        self._keeps_residuals = self._config.transfer.encoding is Encoding.INT8
        self._clients_keep = self._keeps_residuals or self._config.training.mutual > 1

    async def play(self) -> list[RoundLine]:
        """Plays all rounds that are not closed yet, once the workers are there (`open`); the lines of all.

        Raises:
            JobError: a round cannot reach its quorum, or too many were not published.
            FedepthError: something else stops it; the rounds before stand.
        """
        config = self._config
        lines = self._record.rounds()
        weights = self._last_weights(lines)
        now = lines[-1].ended_at if lines else 0.0
        number = len(lines) + 1
        self._check_guard(lines)
        pending: Closing | None = None
        try:
            while number <= config.job.rounds or pending is not None:
                played: Played | None = None
                trouble: JobError | None = None
                started = time.monotonic()
                if number <= config.job.rounds and not (pending is not None and self._clients_keep):
                    try:
                        played = await self._train_round(number, now, weights)
                    except JobError as error:  # perhaps of weights that are not in force
                        trouble = error
                if pending is not None:
                    line, weights = await self._settle(pending)
                    lines.append(line)
                    self._keep_weights(lines)
                    self._check_guard(lines)
                    was, pending = pending, None
                    if not line.published and was.new is not None:
                        continue  # what was trained meanwhile was trained from weights that are not in force
                if trouble is not None:
                    raise trouble
                if played is None:
                    continue
                pending = await self._close(number, played, now, weights, started)
                weights, now = pending.new or weights, played.ended_at
                number += 1
        finally:
            if pending is not None:
                pending.evaluated.cancel()
                await asyncio.gather(pending.evaluated, return_exceptions=True)
        return lines

    def _last_weights(self, lines: Sequence[RoundLine]) -> InForce:
        if not lines:
            return InForce(self._record.weights(0), self._simulation.prepared.digest, 0, None)
        last = lines[-1]
        known = [line.accuracy for line in lines if line.published and line.accuracy is not None]
        path = self._record.weights(last.weights_round)
        return InForce(path, last.weights_digest, last.weights_round, known[-1] if known else None)

    async def open(self) -> None:
        """Starts the engine's workers on the data of the simulation."""
        config, folder = self._config, self._record.folder
        self._tests = await self._engine.start(
            Open(
                data=str(self._simulation.options.source),
                model=model_spec(config),
                graph=str(folder / "graph.json"),
                partition=str(folder / "partition.json"),
                test_data=config.test_data,
                scratch=str(folder / "work"),
                damage=tuple(self._simulation.damage),
                most_damaged=config.most_damaged,
            )
        )

    # --- training

    async def _train_round(self, number: int, now: float, weights: InForce) -> Played:
        config = self._config
        training = training_spec(config, number)
        plans, left_out = self._plans(training)
        if number == 1 or not plans:
            self._tell_left_out(left_out, len(plans))
        durations = {client: self._seconds(client, plan, training, weights) for client, plan in plans.items()}
        job = config.job
        rules = Rules(
            rounds=job.rounds,
            devices_per_round=job.devices_per_round,
            quorum=job.needed,
            gather_s=job.gather_s,
            deadline_s=job.round_deadline_s,
            lease_s=job.lease_s,
            seed=job.seed,
            remind_s=float("inf"),
        )
        judged: list[Norms] = []

        async def train(given: Given) -> Result | Failure:
            outcome = await self._train(given, plans[given.client], training, weights)
            self._reporter.task_done()
            return outcome

        def judge(result: Result) -> str:
            why = self._judge(result, judged, weights)
            if why and self._keeps_residuals:
                self._residuals(result.device_id).drop(result)
            return why

        self._reporter.begin_round(number, min(job.devices_per_round, len(plans)))
        played = await Round(rules, number, now, durations, self._simulation.trace, train, judge).play()
        self._reporter.trained()
        if self._keeps_residuals:
            for given in played.late:
                self._residuals(given.client).clear("its update came too late")
        return played

    def _residuals(self, client: str) -> Residuals:
        return self._record.residuals(self._clients[client].number)

    def _plans(self, training: TrainingSpec) -> tuple[dict[str, Plan], dict[str, PlanError | str]]:
        """The plan of every client that can take part, and why the others cannot."""
        plans: dict[str, Plan] = {}
        left_out: dict[str, PlanError | str] = {}
        for client in self._simulation.clients:
            least = self._tables.of(training).smallest_micro_batch
            if not client.sample_count:
                left_out[client.id] = "it has no samples"
            elif client.pinned is not None and client.sample_count < least:
                left_out[client.id] = f"BatchNorm needs at least {least} samples at once, it has {client.sample_count}"
            elif client.pinned is not None:
                plans[client.id] = client.pinned
            else:
                found = self._answer(client, training)
                if isinstance(found, Plan):
                    plans[client.id] = found
                else:
                    left_out[client.id] = found
        return plans, left_out

    def _question(self, client: Client, training: TrainingSpec) -> Question:
        return question(
            self._tables.of(training),
            client.tier.calibration,
            training,
            client.sample_count,
            client.tier.budget_bytes,
        )

    def _answer(self, client: Client, training: TrainingSpec) -> Plan | PlanError:
        asked = self._question(client, training)
        if asked not in self._answers:
            self._answers[asked] = self._planner.answer(asked)
        return self._answers[asked]

    def _tell_left_out(self, left_out: dict[str, PlanError | str], able: int) -> None:
        if not left_out:
            return
        client, why = next(reversed(left_out.items()))
        if not able:
            raise JobError(f"no client can train this job, as {client}: {why}")
        self._reporter.say(f"{len(left_out)} of {len(left_out) + able} clients cannot take part, as {client}: {why}")

    def _seconds(self, client: str, plan: Plan, training: TrainingSpec, weights: InForce) -> float:
        """How long a task takes in simulated seconds, from the first byte down to the last byte up."""
        conditions = self._simulation.trace.of(client)
        seconds = 0.0
        size = self._simulation.prepared.layout.size_bytes
        if conditions.download_bytes_per_second is not None:
            seconds += size / conditions.download_bytes_per_second
        if conditions.images_per_second is not None:
            count = self._clients[client].sample_count
            whole = self._planner_work(client, training, None)
            images = count * training.local_epochs * self._planner_work(client, training, plan) / whole
            seconds += images / conditions.images_per_second
        if conditions.upload_bytes_per_second is not None:
            layout = self._simulation.prepared.layout
            tensors = (layout.without_statistics() if training.fixed_statistics else layout).trained_tensors(plan)
            sent = (each for tensor in tensors for each in tensor.as_sent(training.encoding))
            seconds += sum(each.size_bytes for each in sent) / conditions.upload_bytes_per_second
        return seconds

    def _planner_work(self, client: str, training: TrainingSpec, plan: Plan | None) -> float:
        """What the planner takes for the time of a client's plan; None: of training one model, everything at once."""
        found = self._clients[client]
        asked = self._question(found, training)
        key = (asked, plan is None)
        if key not in self._works or found.pinned is not None:
            if plan is None:
                alone = replace(asked.training, mutual=1)
                whole = self._planner.answer(replace(asked, training=alone, budget_bytes=EVERYTHING))
                plan = whole if isinstance(whole, Plan) else None
            costs = replace(self._tables.of(asked.training), calibration=asked.calibration)
            work = estimated_work(costs, asked.training, asked.sample_count, plan) if plan is not None else 1.0
            self._works[key] = max(work, 1.0)
        return self._works[key]

    async def _train(self, given: Given, plan: Plan, training: TrainingSpec, weights: InForce) -> Result | Failure:
        """Trains a task, unless that was done before the run was interrupted."""
        client, prepared = self._clients[given.client], self._simulation.prepared
        output = self._record.update(given.round, given.task_id, given.attempt)
        task = Task(
            task_id=given.task_id,
            attempt=given.attempt,
            job=self._config.job.name,
            round=given.round,
            model=model_spec(self._config),
            training=training,
            policy=policy(self._config),
            plan=plan,
            graph_digest=prepared.graph_digest,
            graph_bytes=prepared.graph_bytes,
            weights_digest=weights.digest,
            weights_bytes=prepared.layout.size_bytes,
            run_id="",
        )
        peers = self._record.peers(client.number) if training.mutual > 1 else None
        known = self._record.trained(output, weights.digest)
        if known is not None and known.device_id == client.id:
            await asyncio.to_thread(self._keep, client, output)  # where the run ended just before
            return known
        request = Train(
            task=task,
            plan=plan,
            client=client.number,
            device_id=client.id,
            calibration=client.tier.calibration,
            budget_bytes=client.tier.budget_bytes if client.pinned is None else _UNLIMITED,
            weights=str(weights.path),
            output=str(output),
            cache=str(self._record.folder / "work" / f"{given.task_id}-{given.attempt}"),
            enforce=self._simulation.options.enforce,
        )
        work = self._planner_work(client.id, training, plan)
        if self._keeps_residuals:
            left_out = await asyncio.to_thread(self._record.residuals(client.number).of, task)
            request = replace(
                request,
                left_out=tuple(map(str, left_out)),
                left_out_output=str(residuals_folder(output / RESIDUALS, task)),
            )
        if peers is not None:
            found = await asyncio.to_thread(peers.of, task)
            request = replace(
                request,
                peers=tuple(str(path) if path else "" for path in found),
                peers_output=str(peers_folder(output / PEERS, task)),
            )
        outcome = await self._trained(request, client, work)
        if isinstance(outcome, Result):
            await asyncio.to_thread(self._keep, client, output)
        return outcome

    def _keep(self, client: Client, output: Path) -> None:
        """Gives a client what its task has left for it beside the update."""
        if self._config.training.mutual > 1:
            self._record.peers(client.number).keep(output / PEERS)
        if self._keeps_residuals:
            self._record.residuals(client.number).keep(output / RESIDUALS)

    async def _trained(self, request: Train, client: Client, work: float) -> Result | Failure:
        """Trains with smaller and smaller plans until one stays inside its budget, as an agent does."""
        task, smaller = request.task, 0
        while True:
            try:
                answer = await self._engine.ask(request, work=work)
            except ChildError as error:
                return Failure(task.task_id, task.attempt, request.device_id, Outcome.TRAINER_DIED, str(error))
            told = answer.get("error")
            if told is None:
                return msgspec.convert(answer["ok"]["result"], Result)
            if told["disk"]:
                raise DiskError(told["message"])
            if told["capped"] and not request.release_freed:
                request = replace(request, release_freed=True)
                continue
            outcome = Outcome(told["outcome"])
            if (outcome is Outcome.DIVERGED or told["peers"]) and request.plan.models > 1 and any(request.peers):
                # An interruption here changes nothing: with them, the task would fail in the same way.
                why = f"training failed with them, and begins again with new ones: {told['message']}"
                await asyncio.to_thread(self._record.peers(client.number).drop, why)
                request = replace(request, peers=("",) * len(request.peers))
                continue
            if outcome is Outcome.ERROR:
                raise as_error(told)
            smaller += 1
            if outcome is not Outcome.OVER_BUDGET or not request.enforce or smaller > SMALLER_PLANS:
                return Failure(task.task_id, task.attempt, request.device_id, outcome, told["message"])
            try:
                plan = self._smaller_plan(request, client, told["miss_bytes"], smaller)
            except PlanError as nothing:
                return Failure(task.task_id, task.attempt, request.device_id, outcome, str(nothing))
            request = replace(request, plan=plan, release_freed=False)

    def _smaller_plan(self, request: Train, client: Client, miss_bytes: int, tries: int) -> Plan:
        training, samples, chosen = request.task.training, client.sample_count, request.task.policy
        costs = replace(self._tables.of(training), calibration=client.tier.calibration)
        least = smallest_peak(costs, training, samples, chosen)
        limit = min(request.budget_bytes, smaller_limit(request.plan, miss_bytes, least, tries))
        return make_plan(costs, budget_bytes=limit, training=training, sample_count=samples, policy=chosen)

    def _judge(self, result: Result, others: list[Norms], weights: InForce) -> str:
        """As a coordinator admits updates: not if they go much further than those that came before."""
        config = self._config
        if not config.guard.learn_norms or config.privacy is not None:
            return ""
        parts = part_paths(self._record.update(result.round, result.task_id, result.attempt), result)
        norms = update_norms(weights.path, parts, self._simulation.prepared.layout.parameters)
        norms = norms.per_step(result.steps(training_spec(config, 1)))
        why = too_far(norms, others)
        if not why:
            others.append(norms)
        return why

    # --- closing

    async def _close(self, number: int, played: Played, began_at: float, weights: InForce, started: float) -> Closing:
        """Averages a round, and begins to evaluate what comes of it."""
        output = self._record.weights(number)
        updates = sorted(played.updates, key=lambda result: result.task_id)
        note, notes, new = "", tuple(played.notes), None
        try:
            told = await asyncio.to_thread(
                combine,
                self._rule(number),
                training_spec(self._config, 1),
                weights.path,
                updates,
                lambda result: part_paths(self._record.update(number, result.task_id, result.attempt), result),
                output,
                parameters=self._simulation.prepared.layout.parameters,
                base_digest=weights.digest,
            )
        except NotFiniteError as error:
            note = str(error)
        except DamagedUpdateError as error:
            for path in error.paths:
                (path.parent / RESULT).unlink(missing_ok=True)  # so that they are trained again
            raise StateError(
                f"round {number}: {len(error.paths)} parts of updates are damaged, such as {error.paths[0]}; check "
                "that disk, and give the same command again"
            ) from error
        else:
            notes += told.notes
            new = InForce(output, told.digest, number, None)
        evaluated = asyncio.create_task(self._evaluate(new))
        return Closing(number, played, weights, new, note, notes, began_at, time.monotonic() - started, evaluated)

    def _rule(self, number: int) -> Rule:
        """The job's rule. Noise is that of the seed: a simulation keeps nobody's secrets, and has to be repeatable."""
        rule = aggregation_rule(self._config)
        if not isinstance(rule, PrivateMean):
            return rule
        digest = hashlib.sha256(f"noise/{self._config.job.seed}/{number}".encode()).digest()
        return replace(rule, seed=int.from_bytes(digest[:16], "big"))

    async def _evaluate(self, new: InForce | None) -> tuple[Evaluation | None, str]:
        """What weights do on the test data, and why that cannot be known, if so."""
        if new is None or self._config.test is None:
            return None, ""
        try:
            batches = -(-self._tests // evaluation.batch_size(model_spec(self._config)))
            asked = [
                self._engine.ask(Evaluate(str(new.path), first, min(first + EVALUATED_AT_ONCE, batches)), filler=True)
                for first in range(0, batches, EVALUATED_AT_ONCE)
            ]
            rows = [row for answer in await asyncio.gather(*asked) for row in result_of(answer)["figures"]]
            figures = msgspec.convert(rows, list[evaluation.BatchFigures])
            found = evaluation.total(figures, self._tests, self._config.most_damaged)
        except FedepthError as error:
            return None, f"the round could not be evaluated: {error}"
        return Evaluation(found.accuracy, found.loss), ""

    async def _settle(self, closing: Closing) -> tuple[RoundLine, InForce]:
        """Records a round, once it is known what its weights do; with the weights in force from now on."""
        found, trouble = await closing.evaluated
        before, note = closing.before, closing.note
        if not note:
            note = objection(found, before.accuracy, self._config.guard)
        in_force = before
        if closing.new is not None and not note:
            accuracy = before.accuracy if found is None else found.accuracy
            in_force = replace(closing.new, accuracy=accuracy)
        line = round_line(
            closing.number,
            closing.played,
            self._clients,
            Evaluation(found.accuracy, found.loss) if found else None,
            note=note,
            notes=(*closing.notes, trouble) if trouble else closing.notes,
            weights_bytes=self._simulation.prepared.layout.size_bytes,
            seconds=closing.seconds,
            began_at=closing.began_at,
            weights_digest=in_force.digest,
            weights_round=in_force.round,
        )
        self._record.close_round(line)
        self._reporter.round_closed(line)
        return line, in_force

    def _keep_weights(self, lines: Sequence[RoundLine]) -> None:
        """Deletes weights as a coordinator does ([retention]), but for the first, and averages that were not published
        among the last `keep_last` numbers."""
        retention, last = self._config.retention, lines[-1]
        published = [line for line in lines if line.published]
        kept = {0, last.weights_round, *range(max(0, last.round - retention.keep_last + 1), last.round + 2)}
        kept.update(line.round for line in published[-retention.keep_last :])
        evaluated = [(line.accuracy, -line.round) for line in published if line.accuracy is not None]
        if retention.keep_best and evaluated:
            kept.add(-max(evaluated)[1])
        if retention.keep_every:
            kept.update(line.round for line in published if line.round % retention.keep_every == 0)
        self._record.keep_weights(sorted(kept))

    def _check_guard(self, lines: Sequence[RoundLine]) -> None:
        after = self._config.guard.pause_after
        last = lines[-after:]
        if len(last) == after and not any(line.published for line in last):
            raise JobError(
                f"the last {after} rounds, up to round {last[-1].round}, were not published, the last since "
                f"{last[-1].note}; change what made the model worse, and give another --output"
            )
