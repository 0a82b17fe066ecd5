"""What can be compared: arms, the target processes that serve them, and tree settings as arms of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.errors import ConfigError

Method = Literal["plain", "constrained", "ngram", "draft_model", "draft_model_lookup", "oracle", "remote"]
"""How a target gets its drafts: not at all (as shipped, or as remote drafts need it), by itself, or from elsewhere."""
Lookup = Literal["ours", "vLLM's", "none"]
"""Whose prompt lookup an arm has."""

#: What drafts for remote targets: the draft model behind the WAN proxy, or a program that sends nonsense.
DRAFTER = "drafter"
RANDOM = "random drafter"
#: Override with which a request is decoded as if there were no drafter.
OFF = "off"
THRESHOLD_KEY = "entropy_threshold_nats"
TREES_FORM = '"name=key=value,key=value; name2=…", as in "narrow=running_branches=4; plain=off; default="'


@dataclass(frozen=True, slots=True)
class Target:
    """A target process; arms that have the same one share it.

    Attributes:
        name: Of the process, its log and its pacing statistics; different for different targets.
        method: How it gets its drafts.
        drafter: What drafts for it where it is remote: `DRAFTER`, `RANDOM`, or nothing: nobody answers.
        sections: Further ones of its YAML file.
    """

    name: str
    method: Method
    drafter: str = ""
    sections: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Arm:
    """One thing to compare.

    Attributes:
        name: What options, tables and result files call it.
        text: What it is.
        target: What serves it.
        override: What its requests ask for in place of the target's tree settings: ``key=value,…``, ``off``, or
            nothing.
        is_tree: Whether it was given as a tree arm, by its override.
    """

    name: str
    text: str
    target: Target
    override: str = ""
    is_tree: bool = False

    def __str__(self) -> str:
        return f"{self.name}={self.override}" if self.is_tree else self.name

    @property
    def is_remote(self) -> bool:
        """Whether its target has our controller."""
        return self.target.method == "remote"

    @property
    def uses_wan(self) -> bool:
        """Whether its drafts cross the emulated WAN, so that it is measured at every round trip."""
        return self.target.drafter == DRAFTER

    @property
    def is_tuned(self) -> bool:
        """Whether the pre-pass chooses how it runs."""
        return self.target.method in ("ngram", "draft_model", "draft_model_lookup")

    @property
    def is_colocated(self) -> bool:
        """Whether a draft model lies beside its target."""
        return self.target.method in ("draft_model", "draft_model_lookup")

    @property
    def lookup(self) -> Lookup:
        """Whose prompt lookup it has."""
        if self.target.method == "ngram":
            return "vLLM's"
        ours = self.is_remote and self.drafts and self.target.sections.get("fallback") != NO_LOOKUP
        return "ours" if ours or self.target.method == "draft_model_lookup" else "none"

    @property
    def drafts(self) -> bool:
        """Whether it takes drafts where its target has them."""
        return self.override != OFF

    @property
    def request_fields(self) -> dict[str, Any]:
        """What its requests have besides prompt and length."""
        return _asking_for(self.override) if self.override else {}

    @property
    def plain_fields(self) -> dict[str, Any]:
        """What requests to its target need to be decoded by the target alone."""
        return _asking_for(OFF) if self.is_remote else {}

    @property
    def threshold_nats(self) -> float | None:
        """The entropy threshold that alone it sets; None where it sets none, or something else too."""
        key, _, value = self.override.partition("=")
        try:
            return float(value) if key == THRESHOLD_KEY else None
        except ValueError:
            return None


def _asking_for(override: str) -> dict[str, Any]:
    return {"vllm_xargs": {"wanspec": override}}


#: Values of sections of a target's YAML file.
NO_WAIT = {"policy": "none"}
NO_LOOKUP: list[str] = []


def _known(name: str, text: str, method: Method, drafter: str = "", **sections: Any) -> Arm:
    return Arm(name, text, Target(name, method, drafter, sections))


BEHIND = "and our prompt lookup behind its drafts, its γ tuned"
ACROSS = "remote drafts across the emulated WAN"
#: The arms that options name, in the order of tables.
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        _known("none", "plain vLLM as shipped", "plain"),
        _known("none_constrained", "plain vLLM without async scheduling, as remote drafts need it", "constrained"),
        _known("ngram", "vLLM's prompt lookup, tuned", "ngram"),
        _known("lookup", "our prompt lookup alone: a remote target for which nobody drafts", "remote"),
        _known("draft_model", "vLLM's co-located draft model, its γ tuned", "draft_model"),
        _known("draft_model_lookup", f"vLLM's co-located draft model {BEHIND}", "draft_model_lookup"),
        _known("oracle", "the target's own greedy text as drafts: the ceiling", "oracle"),
        _known("wanspec", f"{ACROSS}, and our prompt lookup behind them", "remote", DRAFTER),
        _known("wanspec_no_lookup", f"{ACROSS} alone", "remote", DRAFTER, fallback=NO_LOOKUP),
        _known("wanspec_no_wait", "as wanspec, without waiting for late drafts", "remote", DRAFTER, late=NO_WAIT),
        _known("wanspec_dead", "remote drafts where nobody answers, without lookup", "remote", fallback=NO_LOOKUP),
        _known(
            "wanspec_random", "remote drafts of random tokens, without lookup", "remote", RANDOM, fallback=NO_LOOKUP
        ),
    )
}
#: Serves all tree arms: prompt lookup would serve part of the steps that a branch is there for.
TREES = Target("trees", "remote", DRAFTER, {"fallback": NO_LOOKUP})


def named_arms(option: str, names: Sequence[str]) -> tuple[Arm, ...]:
    """Return the arms that an option names.

    Raises:
        ConfigError: One of them is none.
    """
    for name in names:
        if name not in ARMS:
            raise ConfigError(f"{option}: {name!r} is not an arm; there are {', '.join(ARMS)}")
    return tuple(ARMS[name] for name in dict.fromkeys(names))


def arms_of(texts: Sequence[str]) -> tuple[Arm, ...]:
    """Return the arms that their texts, as `str` gives them, stand for.

    Raises:
        ConfigError: A text is not of an arm.
    """
    return tuple(arm for one in texts for arm in (tree_arms("arms", one) if "=" in one else named_arms("arms", [one])))


def tree_arms(option: str, text: str, target: Target = TREES) -> tuple[Arm, ...]:
    """Read ``"name=override; name2=override2"``.

    Raises:
        ConfigError: Not of that form, a name is given twice, or no request may ask for such an override.
    """
    arms: dict[str, Arm] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        name, _, override = (piece.strip() for piece in part.partition("="))
        override = ",".join(map(str.strip, override.split(",")))
        try:
            if override not in ("", OFF):
                TreeSettings().overridden(override)
        except ConfigError as error:
            raise ConfigError(f"{option}: {part!r} is not an arm ({error}), expected {TREES_FORM}") from None
        if not name:
            raise ConfigError(f"{option}: {part!r} is not an arm, expected {TREES_FORM}")
        if name in arms:
            raise ConfigError(f"{option}: the name {name!r} is given twice; names must differ")
        asked = f"asking for `{override}`" if override else "as configured"
        arms[name] = Arm(name, f"remote drafts without prompt lookup, {asked}", target, override, is_tree=True)
    if not arms:
        raise ConfigError(f"{option}: {text!r} names none, expected {TREES_FORM}")
    return tuple(arms.values())
