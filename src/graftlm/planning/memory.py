"""Predicted memory of a run, phase by phase, from the base's config alone."""

from __future__ import annotations

from dataclasses import dataclass

from graftlm.evaluation.tasks import LONGEST, MARGIN
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.models.recompute.policy import Policy
from graftlm.planning.activations import (
    evaluation_bytes,
    layer_bytes,
    possible_policies,
    reading_bytes,
    step_bytes,
)
from graftlm.planning.allocator import (
    AT_LOADING,
    Heap,
    beside_measuring,
    beside_on_gpu,
    beside_reading,
    heap_of,
)
from graftlm.planning.base_facts import BaseFacts
from graftlm.planning.estimates import MemoryEstimate, Part, Phase
from graftlm.planning.held import Held, held_bytes
from graftlm.planning.machine import Machine
from graftlm.planning.memory_setup import Setup, setup_of
from graftlm.planning.rehearsal import StepBytes
from graftlm.planning.workload import Workload
from graftlm.training.memory_classes import GRADIENTS, OPTIMIZER, TRAINED
from graftlm.training.recipe import Recipe
from graftlm.training.recompute import SAFETY

LIBRARIES, KEPT, AT_WORK, HOLES = "libraries", "kept for backward", "at work", "held by the allocator"
PROBES, PROBE_VALUES = 8, 2**25
"""Of the proof at the end of a run (`verbs.proof`): texts, and logits of all of them at most."""
EVALUATED_ROWS, EVALUATED_TOKENS = 16, 8192
"""Of one batch of a measurement (`evaluation.perplexity`)."""
READ_VALUES = 10
"""Bytes for each value of the largest weight while it is read and quantised: stored, in 32 bits, scaled."""


def estimate_memory(
    recipe: Recipe, facts: BaseFacts, workload: Workload, machine: Machine, *, recompute: str = "auto"
) -> MemoryEstimate:
    """The memory of a run on that machine, as the highest stack of bytes in each of its phases.

    Args:
        recompute: a policy by name; "auto" is what the run would choose there.

    Raises:
        TargetError, ConfigError: the method does not fit the base.
    """
    setup = setup_of(recipe, facts, workload, machine)
    held = held_bytes(setup)
    policy = policy_of(setup, held, machine, recompute)
    return MemoryEstimate(
        tuple(_Run(setup, held, workload, machine, policy).phases()), _notes(setup, machine, policy)
    )


@dataclass(frozen=True)
class _Run:
    """One run on one machine."""

    setup: Setup
    held: Held
    workload: Workload
    machine: Machine
    policy: Policy

    @property
    def is_cpu(self) -> bool:
        return self.machine.device == "cpu"

    @property
    def is_packed(self) -> bool:
        return self.setup.scheme is not None

    @property
    def heap(self) -> Heap:
        return heap_of(self.setup.dtype.itemsize)

    def phases(self) -> list[Phase]:
        """In the order in which a run first comes to them."""
        step, beside = step_bytes(self.setup, self.policy), self._beside_step()
        under_way = self.heap.beside_weights(self.setup.facts.total, is_packed=self.is_packed)
        base, weights = self._libraries(under_way), self._weights()
        own, state = Part(TRAINED, self.held.trained), Part(OPTIMIZER, self.held.state)
        waiting = 0 if self.setup.is_first else self.held.gradients
        kept = [Part(GRADIENTS, waiting), Part(KEPT, step.kept - waiting)]

        def stepping(name: str, most: float, *more: Part) -> Phase:
            inside = Part(AT_WORK, max(0.0, most - step.kept))
            return Phase(name, (*base, *weights, own, state, *kept, inside, Part(HOLES, beside), *more))

        most = max(step.forward, step.backward)
        measured, written = self._measuring(), self._writing()
        alone = max(measured, written)
        alone_beside = beside_reading(alone, self.machine.device)
        before = Phase("evaluate", (*base, *weights, own, Part(AT_WORK, alone), Part(HOLES, alone_beside)))
        # On a CPU what a step freed stays with the process until training is over.
        extra = Part("measuring", beside_measuring(measured, most))
        between = stepping("evaluate", most, extra) if self.is_cpu else before
        copies = Part("copies to save", self.held.trained + self.held.state)
        after_steps = Phase("update", (*base, *weights, own, state, Part(GRADIENTS, self.held.gradients)))
        return [
            Phase("load", (*self._libraries(AT_LOADING), *self._loading())),
            max((before, between), key=lambda phase: phase.bytes),
            Phase("attach", (*base, *weights, own)),
            stepping("forward", most if self.is_cpu else step.forward),
            stepping("backward", most),
            stepping("update", most) if self.is_cpu else after_steps,
            stepping("save", most, extra) if self.is_cpu else Phase("save", (*after_steps.parts, copies)),
            Phase("verify", (*base, *weights, own, *self._proving())),
        ]

    def _libraries(self, more: float) -> list[Part]:
        return [Part(LIBRARIES, self.machine.idle_bytes + (more if self.is_cpu else 0))]

    def _weights(self) -> list[Part]:
        return [Part(name, size) for name, size in self.held.base]

    def _beside_step(self) -> float:
        if not self.is_cpu:
            return beside_on_gpu(step_bytes(self.setup, self.policy))
        layer, is_first = layer_bytes(self.setup), self.setup.is_first
        return self.heap.beside_step(layer, self.held.largest, is_first=is_first)

    def _loading(self) -> list[Part]:
        """Dense weights in their own format lie in mapped files until they are used."""
        stored = self.setup.facts.dtype == str(self.setup.dtype).removeprefix("torch.")
        if self.setup.scheme is not None:
            return [*self._weights(), Part(AT_WORK, READ_VALUES * self.held.largest)]
        return [] if self.is_cpu and stored else self._weights()

    def _held_out(self) -> int:
        """Tokens of the longest held-out row."""
        guess = min(self.setup.load.length, round(2 * self.workload.mean_row_tokens))
        length = max(2, self.workload.longest_held_out or guess)
        return min(length, self.setup.facts.context or length)

    def _measuring(self) -> float:
        """The loss on held-out rows."""
        length = self._held_out()
        rows = max(1, min(EVALUATED_ROWS, EVALUATED_TOKENS // length, self.workload.held_out_rows or 1))
        if self.setup.facts.is_encoder_decoder:  # all logits of the targets, in 32 bits
            return reading_bytes(self.setup, rows, length) + 4.0 * rows * length * self.setup.facts.vocabulary
        if self.setup.facts.ending.kind != "text":
            return reading_bytes(self.setup, rows, length)
        return evaluation_bytes(self.setup, rows, length)

    def _writing(self) -> float:
        """Answers to held-out prompts: the prompt is read, and keys and values of all tokens are kept."""
        facts, answer = self.setup.facts, self.workload.longest_answer
        if facts.ending.kind != "text" or facts.is_encoder_decoder or not answer:
            return 0.0
        length = max(2, self._held_out() - answer)
        rows = max(1, min(EVALUATED_ROWS, self.workload.held_out_rows or 1))
        tokens = length + min(LONGEST, answer + MARGIN)
        token = 2 * facts.layers * facts.kv_heads * facts.head_size * self.setup.dtype.itemsize
        return evaluation_bytes(self.setup, rows, length) + rows * tokens * token

    def _proving(self) -> list[Part]:
        """Logits of the probes of three states, those of one compared in 64 bits, and the weights before a
        merge."""
        facts = self.setup.facts
        is_text = facts.ending.kind == "text"
        vocabulary = facts.vocabulary if is_text else max(1, len(facts.ending.labels))
        most = max(2, PROBE_VALUES // max(1, vocabulary) // PROBES)
        length, mean = min(self._held_out(), most), min(self.workload.mean_row_tokens, most)
        values = length * vocabulary if is_text else vocabulary
        logits = 3 * PROBES * 4 * vocabulary * (mean if is_text else 1) if self.is_cpu else 0
        read = reading_bytes(self.setup, 1, length)
        inside = max(read, 6 * 8 * values) if self.is_cpu else read
        merges = isinstance(self.setup.config, LoraConfig | IA3Config) and self.setup.placement == "resident"
        merged = self.held.adapted if merges else 0
        one = 8 * self.held.largest if merges or self.setup.scheme is not None else 0
        live = logits + inside + one
        beside = beside_reading(inside + one, self.machine.device)
        beside += self.heap.beside_proof(is_packed=self.is_packed) if self.is_cpu else 0
        return [Part("weights before the merge", merged), Part(AT_WORK, live), Part(HOLES, beside)]


def _notes(setup: Setup, machine: Machine, policy: Policy) -> tuple[str, ...]:
    notes = [f"recomputed in backward: {policy}"]
    if machine.device != "cpu":
        notes.append("the GPU's share of operators was not measured; it is counted as on a CPU")
    if setup.placement != "resident":
        notes.append(f"layers on {setup.placement}: two of them are counted at a time")
    return tuple(notes)


def policy_of(setup: Setup, held: Held, machine: Machine, asked: str) -> Policy:
    """The policy by that name, or what `training.recompute.choose` would take with so much memory free."""
    policies = possible_policies(setup)
    named: list[Policy] = [policy for policy in policies if policy == asked]
    if named:
        return named[0]
    if setup.placement == "host":
        return "everything"
    free = machine.memory_bytes - machine.idle_bytes - held.weights - held.trained
    room = SAFETY * free - held.gradients - held.state
    for policy in policies:
        if _needed(step_bytes(setup, policy)) <= room:
            return policy
    return policies[-1]


def _needed(step: StepBytes) -> float:
    return max(step.forward, step.backward)
