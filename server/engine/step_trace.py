"""Where the time of steps goes, to be read by benches."""

import time
from dataclasses import dataclass, field

from server.core.step import Step
from server.executor.executor import Landing


@dataclass(slots=True)
class StepTrace:
    """Seconds of the stages of all steps since it was made or cleared.

    `schedule` and `launch` prepare the next step; `pack`, `forward`, `verify`, `compact` and
    `draft` are the executor's; `commit`, `propose` and `finish` take up what landed.

    Attributes:
        stage_s: Seconds by stage.
        num_steps: Steps that landed.
        num_tokens: Tokens that these steps computed.
        num_sequences: Sequences that took part in them, counted in each step.
        num_prompt_tokens: Tokens of prompts among them.
    """

    stage_s: dict[str, float] = field(default_factory=dict)
    num_steps: int = 0
    num_tokens: int = 0
    num_sequences: int = 0
    num_prompt_tokens: int = 0
    _marked_s: float = 0.0

    def start(self) -> None:
        """Begin a stage."""
        self._marked_s = time.perf_counter()

    def stop(self, stage: str) -> None:
        """End the stage that was begun last, and begin another."""
        now_s = time.perf_counter()
        self.stage_s[stage] = self.stage_s.get(stage, 0.0) + now_s - self._marked_s
        self._marked_s = now_s

    def note_landing(self, step: Step, landing: Landing) -> None:
        """Add the executor's stages of a step, and begin a stage."""
        for stage, seconds in landing.stage_s.items():
            self.stage_s[stage] = self.stage_s.get(stage, 0.0) + seconds
        self.num_steps += 1
        self.num_sequences += len(step.entries)
        for entry in step.entries:
            self.num_tokens += entry.num_tokens
            self.num_prompt_tokens += 0 if entry.is_decoding else entry.num_committed
        self.start()

    def clear(self) -> None:
        """Forget all steps."""
        self.stage_s.clear()
        self.num_steps = self.num_tokens = self.num_sequences = self.num_prompt_tokens = 0
