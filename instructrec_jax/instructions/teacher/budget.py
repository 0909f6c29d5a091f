"""A limit in tokens and in money that is never exceeded: what is under way counts at its most."""

from __future__ import annotations

from instructrec_jax.config import TeacherConfig
from instructrec_jax.errors import ConfigError
from instructrec_jax.instructions.teacher.cache import Usage

_FRAME = 64  # tokens that a chat template, a system message and a JSON schema may add to a prompt, in names and marks


def most(prompt: str, max_output_tokens: int) -> Usage:
    """The most tokens of a request: no tokeniser makes more tokens of a text than it has bytes."""
    return Usage(len(prompt.encode()) + _FRAME, max_output_tokens)


class Budget:
    """Counts tokens and money against the limits of a config.

    Raises:
        ConfigError: a limit in money without prices.
    """

    def __init__(self, config: TeacherConfig, spent: Usage):
        if config.max_money > 0 and not (config.price_per_million_in > 0 or config.price_per_million_out > 0):
            raise ConfigError(
                f"teacher.max_money = {config.max_money:g}, but both prices are 0",
                remedy="set teacher.price_per_million_in and teacher.price_per_million_out",
            )
        self._config = config
        self.spent, self.under_way = spent, Usage()

    def money(self, usage: Usage) -> float:
        """What tokens cost, in the currency of the prices."""
        c = self._config
        return (usage.prompt * c.price_per_million_in + usage.answer * c.price_per_million_out) / 1e6

    def fits(self, wanted: Usage) -> bool:
        """Whether a request of this size stays within both limits, whatever the requests under way will cost."""
        total, c = self.spent + self.under_way + wanted, self._config
        return (not c.max_tokens_total or total.total <= c.max_tokens_total) and (
            not c.max_money or self.money(total) <= c.max_money
        )

    def begin(self, wanted: Usage) -> None:
        """A request goes out."""
        self.under_way += wanted

    def end(self, wanted: Usage, cost: Usage) -> None:
        """A request is over, and cost this much."""
        self.under_way -= wanted
        self.spent += cost

    def __str__(self) -> str:
        money = f", {self.money(self.spent):.4f} in money" if self.money(Usage(1_000_000, 1_000_000)) else ""
        return f"{self.spent.total:,} tokens{money}"
