"""The worker's side of training, as user code sees it: a context manager, an iterator of batches, and ``step()``.

Everything here runs in the thread of the user's script; there is no background thread but Kazoo's, the one that reads
the plan, and the monitor's. What a step is, and what waits for what, is up to the strategy of the job's mode.

The class is longer than others here: it is all that user code sees, and more than half of it is its reference.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from psa_store import logs
from psa_store.cluster import NO_WORKER, Cell, ProcessRole
from psa_store.config import load_settings
from psa_store.errors import UsageError
from psa_store.job.average import Average
from psa_store.job.change import Numbers
from psa_store.job.config import check_job_name
from psa_store.job.layout import make_layout
from psa_store.job.mode import parse_mode
from psa_store.observe import Event, EventKind, add_if_possible
from psa_store.optim import Optimizer
from psa_store.optim.note import checked_weight
from psa_store.testing import failpoints
from psa_store.testing.failpoints import failpoint
from psa_store.worker.batches import Batches, RankStep, seed_everything
from psa_store.worker.creation import Wanted, new_config
from psa_store.worker.draft import write_draft
from psa_store.worker.flat_model import FlatModel, describe_model
from psa_store.worker.given_optimizer import GivenOptimizer
from psa_store.worker.health import Progress, as_reported
from psa_store.worker.opening import Given, Opened, announce_failure, open_worker
from psa_store.worker.script import check_model, script_line, whole_number
from psa_store.worker.staged_state import StagedScriptState
from psa_store.worker.stages import BuildStage, StagedModel, describe_stages, refuse_with_stages
from psa_store.worker.state import ScriptState
from psa_store.worker.strategy.staged import StagedStrategy
from psa_store.worker.streams import StreamBatches, is_stream


class Worker:
    """Compute gradients for some ranks of a job; the servers do the rest.

    Args:
        job: name of the training run; None takes ``PSA_JOB``. Running the same job again resumes it.
        model: any module. Its parameters and buffers become views of one flat memory while the worker lives.
        stages: instead of a model, functions, each of which builds a part of it, an ``nn.Module``. It is called as
            ``stage(carry, microbatch)``: ``carry`` is what the stage before returned, a tensor or a tuple of tensors
            (None in the first one), and the last one returns the loss, or (loss, weight). Names of parameters are those
            of the whole model. The script calls :meth:`compute` for the passes. Each worker has only the stages of
            which the plan gives it cells, so any number of workers trains to the same bits. Goes with mode sync.
        microbatches: equal parts in which the batch of a rank goes through the stages.
        resident_stages: how many stages this process can have in memory at once, with the same bits: it has one after
            the other then, at the cost of one forward pass more. None: all that it computes.
        optimizer: from ``psa.optim``, or one of ``torch.optim`` that is not stepped; its update is applied by the
            servers.
        lr_scheduler: of ``torch.optim``, made of that optimizer; one tick is one ``step()``. The script may tick it
            after each ``step()``, or not at all.
        ranks: world size, fixed when the job is created. None: the stored one, or ``PSA_RANKS``, or the number of
            workers of `psa run`, or torchrun's WORLD_SIZE, or 1.
        steps: where the job ends; None: never. What `psa job set` says counts more.
        seed: root of all randomness: order of samples, and torch's, numpy's and Python's generators per (step, rank).
        mode: how updates and ranks wait for each other: "sync", "async", "ssp:staleness=2" or "local:steps=20" (see
            ``psa_store.job.mode``), fixed when the job is created. None: the stored one, or ``PSA_MODE``, or "sync".
        shard_bytes: size of a shard, a multiple of 4096. None: chosen by the size of the model.
        average: of the parameters over the steps, ``psa.ema(0.999)``, which servers keep: for :meth:`average`,
            ``psa.Store`` and exports. It belongs to the job; None: there is none.
        state: what :attr:`state` is in the beginning; None: the script has none.
        tokenizer: or a processor: kept with the job, so that exports have its files beside ``config.json``, which a
            model of transformers brings along.
        push_early: whether gradients are pushed while ``backward()`` runs, so that they can not be changed after it.
            None: if the script changes none in the first steps; what counts is then what it has at ``step()``.

    Raises:
        UsageError: the model, the optimizer or the surroundings cannot be used; JobMismatch if the job exists
            with others.
        DependencyUnreachable: Redis or ZooKeeper does not answer.

    Not thread-safe. Example::

        with psa.Worker("demo", model, optimizer=psa.optim.SGD(lr=0.1), steps=100) as worker:
            for x, y in worker.batches(dataset, batch_size=32):
                loss(model(x), y).backward()
                worker.step()
    """

    def __init__(
        self,
        job: str | None,
        model: nn.Module | None = None,
        *,
        stages: Sequence[BuildStage] | None = None,
        microbatches: int = 1,
        resident_stages: int | None = None,
        optimizer: Optimizer | torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        ranks: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        mode: str | None = None,
        shard_bytes: int | None = None,
        push_early: bool | None = None,
        average: Average | None = None,
        state: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
    ) -> None:
        if (model is None) is not (stages is not None and len(stages) > 0):
            raise UsageError("psa.Worker needs a model, or stages=[…] that build its parts, and not both")
        if model is not None:
            check_model(model)
            if microbatches != 1:
                raise UsageError(f"microbatches={microbatches} goes with stages=[…]; a script cuts batches as it likes")
            if resident_stages is not None:
                raise UsageError(f"resident_stages={resident_stages} goes with stages=[…]: a model in one piece is one")
        steps = None if steps is None else whole_number("steps", steps, 0)
        self._settings = load_settings()
        logs.configure_once(self._settings.log_level, ProcessRole.WORKER, as_json=self._settings.log_json)
        name = job or self._settings.job
        if not name:
            raise UsageError("the job has no name: give psa.Worker a name or set PSA_JOB")
        check_job_name(name)
        if average is not None and not isinstance(average, Average):
            raise UsageError(f"average={average!r}: give psa.ema(0.999), or another decay")
        seed = whole_number("seed", seed)
        self._optimizer = GivenOptimizer(optimizer, lr_scheduler, model, steps)
        rule = self._optimizer.optimizer
        self._script_state: ScriptState | StagedScriptState | None = None
        if model is None:
            refuse_with_stages(push_early=push_early)
            staged_state = None if state is None else StagedScriptState(state, len(stages or ()))
            self._script_state = staged_state
            specs = describe_stages(stages or (), seed, rule.group_of, staged_state)
        else:
            self._script_state = None if state is None else ScriptState(model, state)
            specs = describe_model(model, rule.group_of)
        layout = make_layout(specs, shard_bytes)
        wanted = Wanted(
            name=name,
            ranks=None if ranks is None else whole_number("ranks", ranks, 1),
            seed=seed,
            optimizer=rule.to_dict(),
            layout=layout.fingerprint,
            mode=None if mode is None else parse_mode(mode),
            average=average,
            stages=len(stages or (None,)),
            microbatches=whole_number("microbatches", microbatches, 1),
        )
        self._given = Given(
            wanted,
            model,
            stages or (),
            None if resident_stages is None else whole_number("resident_stages", resident_stages, 1),
            layout,
            self._optimizer,
            self._script_state,
            steps,
            push_early,
            tokenizer,
        )
        if self._settings.draft is not None:
            # `psa estimate` wants to know what the job would be: nothing else of the script is to happen.
            write_draft(new_config(wanted, self._settings), layout, resident_stages, self._settings.draft)
            raise SystemExit(0)

        self._current: RankStep | None = None
        self._samples: int | None = None
        self._progress = Progress()
        self._opened: Opened | None = None
        self._is_open = False

    # --- what user code may ask

    @property
    def version(self) -> int:
        """Steps that the parameters in the model have behind them; 0 before the ``with`` statement."""
        return self._strategy.version if self._opened is not None else 0

    @property
    def rank(self) -> int:
        """The rank for which the present batch is."""
        if self._current is None:
            raise UsageError("worker.rank exists between a batch and its worker.step()")
        return self._current.rank

    @property
    def ranks(self) -> int:
        """World size."""
        return self._config.ranks

    @property
    def term(self) -> int:
        """Term of the plan that this worker follows."""
        plan = self._membership.standing.plan
        return plan.term if plan else 0

    @property
    def members(self) -> int:
        """Workers that hold a rank, or a part of one."""
        plan = self._membership.standing.plan
        return len(set(plan.cells) - {NO_WORKER}) if plan else 0

    @property
    def is_main(self) -> bool:
        """True in one process at a time, the one that holds rank 0 (its last stage): print and evaluate there.

        With stages, in a batch of rank 0, from :meth:`compute` on: where that has returned the loss.
        """
        strategy = self._strategy if self._opened is not None else None
        now = self._current
        if isinstance(strategy, StagedStrategy) and strategy.computed is not None and now is not None and now.rank == 0:
            return self._config.stages - 1 in strategy.computed
        made = max(self.version - 1, 0)  # a cell may move between the step that was made and the next one
        return Cell(0, self._config.stages - 1) in self._membership.standing.cells_at(made)

    @property
    def finished(self) -> bool:
        """True after the last step, False in a worker that leaves before. After the ``with`` all steps are durable."""
        return self.steps is not None and self.version >= self.steps

    @property
    def steps(self) -> int | None:
        """Where the job ends: what `psa job set` said last, or what the script says; None: never."""
        return self._given.steps if self._opened is None else self._strategy.session.steps

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0, as servers apply it.

        It is what the schedule, `psa job set` and :meth:`change` have said so far; groups have their part of it.
        ``worker.lr_at(worker.version)`` is that of the coming step, in all modes but `local`, where a version is a
        round of steps.
        """
        return self._optimizer.at(step).lr_at(step)

    @property
    def stages(self) -> dict[int, nn.Module]:
        """With ``stages=``: the modules of the stages that this worker has at present, by index, to look at and to
        evaluate with. Which they are changes with the plan; there are none before the first batch.

        Raises:
            UsageError: the worker was made with a model in one piece.
        """
        if self._given.model is not None:
            raise UsageError("worker.stages: this worker has a model in one piece, which the script gave")
        model = None if self._opened is None else self._opened.model
        return model.modules if isinstance(model, StagedModel) else {}

    @property
    def state(self) -> dict[str, Any]:
        """The script's own state at the present version: what ``psa.Worker(…, state=)`` began with, to be changed.

        It belongs to rank 0: what the script leaves in it until rank 0's :meth:`step` makes the next version, as its
        gradient does, is committed with it, and is what all workers find in it then, after a resume as well. Numbers,
        strings, lists, dictionaries and tensors; at most 1 MB.

        With stages it belongs to the last stage of rank 0: it may be changed between :meth:`compute` and :meth:`step`,
        ``if loss is not None and worker.rank == 0``. A change elsewhere is refused with the next call.

        Raises:
            UsageError: the worker was made without.
        """
        if self._script_state is None:
            raise UsageError("worker.state: write psa.Worker(…, state={}), with what it is in the beginning")
        return self._script_state.values

    # --- life

    def __enter__(self) -> Worker:
        with ExitStack() as stack:
            opened = open_worker(stack, self._given, self._settings, self._progress)
            self._resources = stack.pop_all()
        self._config, self._membership, self._strategy = opened.config, opened.membership, opened.strategy
        self._flat_model, self._average, self._opened = opened.model, opened.average, opened
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = self._current
        announce_failure(
            self._settings, error, f"step {self.version}" if now is None else f"step {now.step}, rank {now.rank}"
        )
        self.close()

    def close(self) -> None:
        """Leave the job: other workers get the ranks. The model keeps its parameters. Idempotent."""
        if self._is_open:
            self._is_open = False
            self._resources.close()

    # --- training

    def batches(self, data: Any, batch_size: int | None = None, *, changed_data: bool = False) -> Iterator[Any]:
        """Yield this worker's batches until the job ends, or until this worker is told to leave.

        Args:
            data: a map-style dataset, which is shuffled, or a DataLoader: its dataset, sampler, collate function and
                processes are used. A sampler is run anew for each pass over the data, with seeds of the job. A stream
                (an iterable dataset, or a DataLoader over one) is read in its order by each process, which leaves out
                what is for other ranks; it must give the same each time.
            batch_size: samples per step over all ranks; each rank gets an equal share. A resumed job may have another
                one: it goes on with the sample that is next. What `psa job set` says counts more.
            changed_data: whether a resumed job may go on with another number of samples, and a new pass over them.

        After a crash anywhere the sequence may go back to an earlier step; the model goes back with it.
        """
        if self._opened is None or not self._is_open:
            raise UsageError("use the worker in a `with` statement")
        config, strategy, ranks = self._config, self._strategy, self._config.ranks
        batch_size = None if batch_size is None else whole_number("batch_size", batch_size, 1)
        on = failpoints.are_on()
        record_for = partial(self._opened.data_position.record_for, changed_data=changed_data)
        batches: Batches | StreamBatches
        if is_stream(data):
            batches = StreamBatches(data, batch_size, seed=config.seed, ranks=ranks, record_for=record_for)
        else:
            in_a_row = config.steps_per_version
            batches = Batches(
                data, batch_size, seed=config.seed, ranks=ranks, round_steps=in_a_row, record_for=record_for
            )
        if not changed_data:
            self._opened.data_position.check(batches.reading)
        with closing(batches):
            while (rank_step := strategy.next_rank_step()) is not None:
                batch = batches.get(rank_step, self._membership.standing.ranks_at(rank_step.step))
                strategy.begin(rank_step)
                if self._script_state is not None:
                    self._script_state.begin(rank_step)
                seed_everything(config.seed, rank_step, "compute")
                self._current = rank_step
                self._optimizer.begin(rank_step.step)
                self._samples = batches.samples
                self._progress.begin(rank_step)
                if on:
                    failpoint("worker.computing")
                yield batch
                self._average.refuse("the next batch")
                if self._current is not None:
                    raise UsageError(
                        f"{script_line()}: the batch before was not followed by worker.step(). To add up several "
                        "gradients, call backward() on parts of one larger batch; to leave a batch out, call "
                        "worker.skip(). A batch comes with the parameters of its step, so none can be read ahead"
                    )
        if self._script_state is not None:
            self._script_state.end()

    def compute(self, batch: Any) -> Tensor | None:
        """With stages: make the forward and backward passes of the present batch that are to be made here.

        Returns:
            The loss of the batch where its last stage is, a scalar without a graph: the mean over micro-batches, by
            their weights if they have such. None elsewhere, and where the job went on in another way meanwhile: the
            batch comes again if it is still wanted.

        Raises:
            UsageError: there is no batch, it can not be cut into micro-batches, or a stage returned something else than
                it may.
        """
        strategy = self._strategy if self._opened is not None else None
        if self._opened is not None:
            self._average.refuse("worker.compute()")
        if self._current is None or not isinstance(strategy, StagedStrategy):
            raise UsageError(
                f"{script_line()}: worker.compute() comes after a batch from worker.batches(), in a worker with stages="
            )
        state = self._script_state
        try:
            if isinstance(state, StagedScriptState):
                state.computing()
            loss = strategy.compute(batch)
            if isinstance(state, StagedScriptState):
                state.computed(self._current.rank, strategy.computed or ())
        except UsageError as error:
            raise UsageError(f"{script_line()}: {error}") from error
        if loss is None:
            self._samples = None  # they count once, where the last stage is
        return loss

    def step(
        self,
        loss: Tensor | float | None = None,
        *,
        weight: float = 1.0,
        metrics: Mapping[str, Tensor | float] = MappingProxyType({}),
    ) -> None:
        """Push the gradient of the present batch; with it the step's last, wait for the next version and load it.

        Args:
            loss: that of this batch, one number, for what shows the job. It is read by another thread, now and then, so
                that no step waits for it, on a GPU either.
            weight: of this rank in the mean of the gradients over ranks, such as the number of tokens over which
                ``loss`` is the mean; float32. 0 leaves the rank out. In modes ``async``, ``ssp`` and ``local`` no
                gradients are averaged, so only 0 and 1 are possible.
            metrics: other numbers of this batch, by name. Their mean over ranks, weighted alike, is in status, report,
                curve and TensorBoard; like ``loss`` they are read now and then.

        Raises:
            UsageError: there is no batch, ``loss`` or one of ``metrics`` is not one number, or ``weight`` or what is in
                :attr:`state` is not possible.
            NonFiniteGradient: the gradient holds NaN or Inf and the job refuses such.
        """
        if self._current is None:
            raise UsageError("worker.step() without a batch from worker.batches()")
        self._average.refuse("worker.step()")
        rank = self._current.rank
        try:
            if isinstance(self._strategy, StagedStrategy) and self._strategy.computed is None:
                raise UsageError("worker.step() without worker.compute(batch): with stages, that makes the passes")
            self._optimizer.end()
            if not isinstance(weight, float) or weight != 1.0:
                weight = checked_weight(weight, self._config)
            loss, metrics = as_reported(loss, metrics)
            if self._script_state is not None:
                self._script_state.save(self._current)
            self._flat_model.end(weight)
        except UsageError as error:
            raise UsageError(f"{script_line()}: {error}") from error
        self._progress.end(rank, self._samples, loss)
        if metrics and self._samples is not None:
            strategy = self._strategy
            self._progress.reported[rank] = strategy.weight if isinstance(strategy, StagedStrategy) else weight, metrics
        self._current = None
        self._strategy.hand_over()
        if self._script_state is not None:
            self._script_state.load()

    def skip(self) -> None:
        """Leave the present batch out: the step is made of the other ranks' gradients; without any, nothing changes.

        The learning rate goes on with the step. Where compression holds parts of gradients back, what was held back
        before is due all the same: there the batch counts as one whose gradient is zero.

        Raises:
            UsageError: there is no batch, or a part of its gradient has left already.
        """
        if self._current is None:
            raise UsageError("worker.skip() without a batch from worker.batches()")
        self._whole_model("worker.skip()").backward.drop()
        self._optimizer.skip()
        self.step(weight=0.0)

    def average(self) -> AbstractContextManager[int]:
        """Inside, the model has the average of its parameters, to evaluate with; then the present ones again.

        With stages that is the part of it that is here, :attr:`stages`. Buffers stay as they are. ``as`` gives the step
        that the average is of: the present one in a worker that holds a rank; in modes async and ssp, and maybe in one
        without a rank, the newest that is durable.

        Raises:
            UsageError: the job keeps no average, there was no batch yet, with which the parameters come, or
                ``backward()`` or :meth:`compute` was called for this one. In the block: these two, :meth:`step`, the
                next batch, and what writes to parameters.
        """
        if not self._is_open or (self._progress.step is None and not self.finished):
            raise UsageError("worker.average() before the first batch, with which the job's parameters come, or after")
        if isinstance(self._strategy, StagedStrategy) and self._strategy.computed is not None:
            self._average.refuse_between("worker.compute()")
        return self._average.show()

    def change(
        self, *, lr: float | None = None, weight_decay: float | None = None, clip_grad_norm: float | None = None
    ) -> None:
        """Change numbers of the optimizer from the present version on, for all ranks and for good.

        To be called where :attr:`is_main`, between :meth:`step` and the next batch. The job keeps the change with the
        version: it is what it was after a resume, a rollback or a fork. It takes about as long as a take-over, and no
        time where the numbers are these already.

        Args:
            lr: a constant rate from now on.
            clip_grad_norm: 0 for no limit.

        Raises:
            UsageError: there is a batch, this worker is not main, a number is not possible, or the mode has no version
                that all ranks share; then `psa job set` does it.
            DependencyUnreachable: Redis or ZooKeeper does not answer.
        """
        numbers = Numbers(lr, weight_decay, clip_grad_norm)
        if self._current is not None or not self.is_main:
            raise UsageError(
                f"{script_line()}: worker.change() comes between worker.step() and the next batch, where is_main"
            )
        if not self._config.keeps_script_state:
            raise UsageError(
                f"{script_line()}: worker.change() goes with mode sync, without backup and speculate; in mode "
                f"{self._config.mode} use `psa job set {self._config.name} {numbers}`"
            )
        session, version = self._strategy.session, self._strategy.version
        if session.history.has(numbers, version):
            return  # made again after a loss: the job kept the change
        while not (session.settle() and session.make_durable([each.id for each in session.plan.servers], version)):
            if session.leaving:
                logs.get_logger().warning("told to leave before a change was made: it is not made", change=str(numbers))
                return
            session.wait()
        assert self._opened is not None
        done = self._opened.change_job(numbers)
        session.expect(done.term)  # or the next step would be computed with the old numbers, in vain
        text = f"the script said: from version {done.version} on {numbers}; term {done.term} began there"
        event = Event(time.time(), EventKind.CHANGED, text, term=done.term, version=done.version)
        add_if_possible(self._config.name, self._settings, event)

    def accumulate(self) -> AbstractContextManager[None]:
        """Inside, ``backward()`` only adds up gradients; call it for all but the last part of a batch."""
        return self._whole_model("worker.accumulate()").backward.accumulate()

    def _whole_model(self, what: str) -> FlatModel:
        if isinstance(self._flat_model, StagedModel):
            raise UsageError(
                f"{script_line()}: {what} does not go with stages, where worker.compute() makes the passes"
            )
        return self._flat_model
