"""Settings as frozen dataclasses, their named presets, and the grammar of forgetting strategies.

Standard library only. Every value is checked when it is built: ValueError says what was got and what is allowed.
Defaults are METHOD's for Stable Diffusion 1.x; a model folder may carry its own (Defaults).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# What each strategy resets to the original weights: a predicate over UNet parameter names. The name says what is kept.
STRATEGIES: dict[str, str] = {
    "none": "",
    "encoderkv": "down_blocks and not (attn2.to_k or attn2.to_v)",
    "noencoder": "'down_blocks'",
    "encoderattn": "down_blocks and not attn",
    "encoderattn+encoder1": "down_blocks and not (attn or down_blocks.1)",
    "decoderkv": "up_blocks and not (attn2.to_k or attn2.to_v)",
    "nodecoder": "'up_blocks'",
    "decoderattn": "up_blocks and not attn",
    "decoderattn+decoder2": "up_blocks and not (attn or up_blocks.2)",
}

# Fields of TuneConfig whose value depends on the profile. loss_threshold 0 never stops early.
PROFILES: dict[str, dict[str, Any]] = {"official": dict(num_steps=40, batch_size=10, unet_lr=6e-5, embedding_lr=1e-3)}
PROFILES["official"] |= dict(text_encoder_lr=0.0, loss_threshold=0.03, loss_scale=65536.0)
PROFILES["paper"] = PROFILES["official"] | dict(loss_scale=1.0)
PROFILES["dreambooth"] = dict(num_steps=100, batch_size=4, unet_lr=5e-6, embedding_lr=0.0)
PROFILES["dreambooth"] |= dict(text_encoder_lr=5e-6, loss_threshold=0.0, loss_scale=65536.0)

# Ways from noise to a picture. 'ddim' is the method's; the others need fewer steps, and are not the reference.
SCHEDULERS = ("ddim", "dpmsolver++", "unipc")

# How tuning computes: float32; bfloat16 with float32 masters; likewise with 8-bit moments, gradients freed at once.
TUNE_MODES = ("auto", "exact", "fast", "lean")

BY_PROFILE: Any = None  # a field left at this value takes its profile's preset

_TOKEN = re.compile(r"""\s*(?:([()])|'([^']+)'|"([^"]+)"|([\w.+-]+))""")


def parse_strategy(strategy: str) -> Callable[[str], bool]:
    """Turn a strategy into a test of one parameter name: True where the weight is reset to the original.

    strategy: a name of STRATEGIES, or a predicate of substrings joined by `and`, `or`, `not` and parentheses, such as
        "down_blocks and not attn". Substrings may be quoted; a predicate of one substring must be, as a bare word
        alone is a strategy's name.
    Raises: ValueError for an unknown name or a malformed predicate
    """
    expression = STRATEGIES.get(strategy, strategy)
    if strategy == "none":
        return lambda name: False
    if strategy not in STRATEGIES and re.fullmatch(r"[\w.+-]*", strategy):
        names = ", ".join(STRATEGIES)
        raise ValueError(
            f"unknown strategy {strategy!r}; expected one of: {names}; or a predicate like 'down_blocks and not attn'"
        )
    tokens = _tokenize(expression)
    if len(tokens) > 100:  # each may nest, and the parser recurses
        raise ValueError(f"malformed strategy: {len(tokens)} words and brackets; expected at most 100")
    predicate = _parse(tokens, expression)
    if tokens:
        raise ValueError(f"malformed strategy {expression!r}: unexpected {tokens[0][1]!r}")
    return predicate


def _tokenize(expression: str) -> list[tuple[str, str]]:
    tokens, position, text = [], 0, expression.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"malformed strategy {expression!r}: cannot read {text[position:]!r}")
        bracket, single, double, bare = match.groups()
        if bracket or bare in ("and", "or", "not"):
            tokens.append(("op", bracket or bare))
        else:
            tokens.append(("text", single or double or bare))
        position = match.end()
    return tokens


def _parse(
    tokens: list[tuple[str, str]], expression: str, joins: tuple[str, ...] = ("or", "and")
) -> Callable[[str], bool]:
    if not joins:
        return _parse_not(tokens, expression)
    terms = [_parse(tokens, expression, joins[1:])]
    while tokens and tokens[0] == ("op", joins[0]):
        tokens.pop(0)
        terms.append(_parse(tokens, expression, joins[1:]))
    combine = any if joins[0] == "or" else all
    return lambda name: combine(term(name) for term in terms)


def _parse_not(tokens: list[tuple[str, str]], expression: str) -> Callable[[str], bool]:
    if not tokens:
        raise ValueError(f"malformed strategy {expression!r}: a substring is missing at its end")
    kind, value = tokens.pop(0)
    if (kind, value) == ("op", "not"):
        inner = _parse_not(tokens, expression)
        return lambda name: not inner(name)
    if (kind, value) == ("op", "("):
        inner = _parse(tokens, expression)
        if not tokens or tokens.pop(0) != ("op", ")"):
            raise ValueError(f"malformed strategy {expression!r}: a ')' is missing")
        return inner
    if kind == "op":
        raise ValueError(f"malformed strategy {expression!r}: unexpected {value!r}")
    return lambda name: value in name


def _require(ok: bool, field: str, got: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{field} {got!r} is out of range; expected {allowed}")


def _choice(field: str, got: object, names: tuple[str, ...]) -> None:
    if got not in names:
        raise ValueError(f"unknown {field} {got!r}; expected one of: {', '.join(names)}")


def _whole(field: str, got: object, low: int) -> None:
    _require(isinstance(got, int) and not isinstance(got, bool) and got >= low, field, got, f"a whole number >= {low}")


def _number(field: str, got: object, low: float = -math.inf, high: float = math.inf) -> None:
    ok = isinstance(got, int | float) and not isinstance(got, bool) and math.isfinite(got) and low <= got <= high
    _require(ok, field, got, f"a finite number in [{low}, {high}]")


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How one photo is learned (METHOD sections 1, 2 and 6). Fields left out take their profile's preset (PROFILES).

    profile: 'official' follows the authors' program, 'paper' the paper, 'dreambooth' trains UNet and text encoder whole
    num_steps: updates at most, each on batch_size samples of noise and timestep
    unet_lr, embedding_lr, text_encoder_lr: Adam's rates, 0 to leave that part as it is; its betas are 0.9 and 0.999,
        its eps is eps
    loss_threshold: a smaller loss ends the tune once step * batch_size > min_samples; 0 never does
    loss_scale: the loss is multiplied by it before the backward pass and never divided again, as upstream's is
    resize: 'fit' keeps the photo's aspect ratio, 'squash' does not
    width, height: pixels, None for the model's own; the area to fill with resize 'fit', the size with 'squash'
    seed: of the posterior draw, the noise and the timesteps
    caption: replaces the captioner's
    mode: how the engine computes, one of TUNE_MODES; 'auto' follows the editor's numerics, and goes down to what fits.
        An editor whose numerics are 'reference' takes 'auto' alone
    memory_bytes: that all may hold on the device, weights included; None for all there is, on a CPU without a limit
    Raises: ValueError naming the field
    Source: Forgedit, arXiv 2309.10556, section 3.2
    """

    profile: str = "official"
    num_steps: int = BY_PROFILE
    batch_size: int = BY_PROFILE
    unet_lr: float = BY_PROFILE
    embedding_lr: float = BY_PROFILE
    text_encoder_lr: float = BY_PROFILE
    loss_threshold: float = BY_PROFILE
    min_samples: int = 350
    loss_scale: float = BY_PROFILE
    eps: float = 1e-8
    resize: str = "fit"
    width: int | None = None
    height: int | None = None
    seed: int = 0
    caption: str | None = None
    mode: str = "auto"
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        _choice("profile", self.profile, tuple(PROFILES))
        _choice("resize", self.resize, ("fit", "squash"))
        for field, preset in PROFILES[self.profile].items():
            if getattr(self, field) is BY_PROFILE:
                object.__setattr__(self, field, preset)
        for field, low in (("num_steps", 1), ("batch_size", 1), ("min_samples", 0), ("seed", 0)):
            _whole(field, getattr(self, field), low)
        for field in ("unet_lr", "embedding_lr", "text_encoder_lr", "loss_threshold", "eps"):
            _number(field, getattr(self, field), 0.0)
        _number("loss_scale", self.loss_scale)
        _require(self.loss_scale > 0, "loss_scale", self.loss_scale, "a number > 0")
        for field, low in (("width", 32), ("height", 32), ("memory_bytes", 1)):
            if getattr(self, field) is not None:
                _whole(field, getattr(self, field), low)
        _choice("mode", self.mode, TUNE_MODES)
        unused = "embedding_lr" if self.profile == "dreambooth" else "text_encoder_lr"
        _require(getattr(self, unused) == 0, unused, getattr(self, unused), f"0 in profile {self.profile}")

    def replace(self, **changes: Any) -> TuneConfig:
        """The same settings with changes. A new profile brings along each preset in which it differs from the old."""
        profile = changes.get("profile", self.profile)
        if profile in PROFILES:
            old, new = PROFILES[self.profile], PROFILES[profile]
            changes = {field: new[field] for field in new if new[field] != old[field]} | changes
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """How one edit is made (METHOD sections 3 to 5).

    strategy: what is forgotten; a name of STRATEGIES or a predicate (parse_strategy)
    keep: share of the tuned weight kept where the strategy matches, 0 to 1
    blend: 'vs' reads gamma; 'vp' reads identity_weight (the photo's) and edit_weight (the target's)
    gamma: 0 is the source embedding, 1 the target's, more goes beyond it
    num_steps: denoising steps, at most the model's training steps
    scheduler: one of SCHEDULERS; 20 steps of the others come about as near as 50 of 'ddim'
    guidance_scale: 1 for no guidance
    seed: of the initial noise
    Raises: ValueError naming the field
    Source: Forgedit, arXiv 2309.10556, sections 3.3 and 3.4
    """

    strategy: str = "none"
    keep: float = 0.0
    blend: str = "vs"
    gamma: float = 1.0
    identity_weight: float = 1.0
    edit_weight: float = 1.0
    num_steps: int = 50
    guidance_scale: float = 7.5
    seed: int = 0
    scheduler: str = "ddim"

    def __post_init__(self) -> None:
        parse_strategy(self.strategy)
        _choice("scheduler", self.scheduler, SCHEDULERS)
        _choice("blend", self.blend, ("vs", "vp"))
        _number("keep", self.keep, 0.0, 1.0)
        for field in ("gamma", "identity_weight", "edit_weight", "guidance_scale"):
            _number(field, getattr(self, field))
        _whole("num_steps", self.num_steps, 1)
        _whole("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A grid of edits: strategies, then strengths (gammas, or identity_weights by edit_weights), then seeds.

    blend: decides which strengths are read; keep, num_steps, guidance_scale, scheduler: of every edit, as in EditConfig
    Raises: ValueError naming the field
    """

    strategies: tuple[str, ...] = ("none", "encoderattn", "decoderattn")
    blend: str = "vs"
    gammas: tuple[float, ...] = (0.8, 1.0, 1.2, 1.4)
    identity_weights: tuple[float, ...] = (0.9, 1.0)
    edit_weights: tuple[float, ...] = (1.0, 1.2, 1.4)
    seeds: tuple[int, ...] = (0,)
    keep: float = 0.0
    num_steps: int = 50
    guidance_scale: float = 7.5
    scheduler: str = "ddim"

    def __post_init__(self) -> None:
        for field in ("strategies", "gammas", "identity_weights", "edit_weights", "seeds"):
            values = getattr(self, field)
            _require(not isinstance(values, str) and len(values) > 0, field, values, "at least one value")
            object.__setattr__(self, field, tuple(values))
        self.edits()

    def edits(self) -> list[EditConfig]:
        """Every edit of the grid, those of one strategy together."""
        strengths: list[dict[str, Any]] = [dict(gamma=gamma) for gamma in self.gammas]
        if self.blend == "vp":
            pairs = itertools.product(self.identity_weights, self.edit_weights)
            strengths = [dict(identity_weight=identity, edit_weight=edit) for identity, edit in pairs]
        fixed = {field: getattr(self, field) for field in ("blend", "keep", "num_steps", "guidance_scale", "scheduler")}
        return [
            EditConfig(strategy=strategy, seed=seed, **fixed, **strength)
            for strategy, strength, seed in itertools.product(self.strategies, strengths, self.seeds)
        ]


def parse_rung(rung: str) -> dict[str, Any]:
    """A rung of a ladder, 'STRATEGY:STRENGTH' or 'STRATEGY:STRENGTH:SEED', as fields of EditConfig.

    STRENGTH: gamma of blend 'vs', such as 1.2; or identity_weight+edit_weight of blend 'vp', such as 0.9+1.3
    SEED: counted from the base edit's own; 0 if left out
    Raises: ValueError for anything else
    """
    if not isinstance(rung, str):  # a file may hold anything
        raise ValueError(f"a rung is {rung!r}; expected text such as encoderattn:0.9")
    strategy, *rest = rung.split(":")
    try:
        strengths = [float(part) for part in rest[0].split("+")]
        seed = int(rest[1]) if len(rest) > 1 else 0
        if len(strengths) > 2 or len(rest) > 2 or seed < 0:
            raise ValueError
    except (IndexError, ValueError):
        raise ValueError(
            f"cannot read the rung {rung!r}; expected STRATEGY:GAMMA or STRATEGY:IDENTITY+EDIT, and :SEED if not 0, "
            "such as encoderattn:0.9, none:0.9+1.3 or none:1.2:1"
        ) from None
    strength: dict[str, Any] = {"blend": "vs", "gamma": strengths[0]}
    if len(strengths) == 2:
        strength = {"blend": "vp", "identity_weight": strengths[0], "edit_weight": strengths[1]}
    EditConfig(strategy=strategy, seed=seed, **strength)
    return {"strategy": strategy, "seed": seed, **strength}


def format_rung(config: EditConfig) -> str:
    """The rung that parse_rung reads as this edit's strategy, strength and seed."""
    strength = f"{config.gamma:g}" if config.blend == "vs" else f"{config.identity_weight:g}+{config.edit_weight:g}"
    return f"{config.strategy}:{strength}" + (f":{config.seed}" if config.seed else "")


@dataclass(frozen=True, kw_only=True)
class ChooseConfig:
    """How an edit is chosen by itself: what is tried, in which order, and what is good enough.

    ladder: rungs, see parse_rung, tried in this order
    max_edits: made at most; budget_s: seconds for all of them, None for no limit; at_once: made between two looks
    scheduler, num_steps: of the edits tried, None for the base edit's: a quick sampler finds as good an edit sooner
    least_margin: an edit agrees with the target if it is nearer to it than to the source by this, cosines of the scorer
    least_kept_db: a good edit's PSNR against the photo, outside where it changed it, at least
    keep_outside: the photo is put back outside where an edit changed it, and what that gives is judged and handed out;
        the whole edit where it changed nearly everything
    Thresholds belong to one scorer and one kind of photo: `forgedit calibrate` finds them.
    Raises: ValueError naming the field
    Source: the order is METHOD item 13's, of the method's authors' own choices
    """

    ladder: tuple[str, ...] = (
        "none:1.0",
        "none:1.3",
        "encoderattn:0.9",
        "none:1.3:1",
        "encoderattn:1.1:1",
        "decoderattn:1.0",
        "decoderattn:1.3",
        "none:1.6",
    )
    max_edits: int = 8
    budget_s: float | None = None
    at_once: int = 1
    least_margin: float = 0.0
    least_kept_db: float = 15.0
    keep_outside: bool = True
    scheduler: str | None = None
    num_steps: int | None = None

    def __post_init__(self) -> None:
        _require(not isinstance(self.ladder, str) and len(self.ladder) > 0, "ladder", self.ladder, "at least one rung")
        written = tuple(format_rung(EditConfig(**parse_rung(rung))) for rung in self.ladder)  # one way, to be compared
        object.__setattr__(self, "ladder", written)
        for field in ("max_edits", "at_once"):
            _whole(field, getattr(self, field), 1)
        if self.budget_s is not None:
            _number("budget_s", self.budget_s, 0.0)
        _number("least_margin", self.least_margin, -2.0, 2.0)
        _number("least_kept_db", self.least_kept_db, 0.0)
        _require(isinstance(self.keep_outside, bool), "keep_outside", self.keep_outside, "True or False")
        if self.scheduler is not None:
            _choice("scheduler", self.scheduler, SCHEDULERS)
        if self.num_steps is not None:
            _whole("num_steps", self.num_steps, 1)


@dataclass(frozen=True)
class Defaults:
    """Settings a model folder recommends to tune, edit, sweep and choose; METHOD's where it says nothing."""

    tune: TuneConfig
    edit: EditConfig
    sweep: SweepConfig
    choose: ChooseConfig = ChooseConfig()

    @classmethod
    def merged(cls, recommended: Mapping[str, Mapping[str, Any]]) -> Defaults:
        """recommended: the "tune", "edit", "sweep" and "choose" objects of forgedit.json, each optional.

        Raises: TypeError for an unknown field, ValueError for a bad value
        """
        sections = ("tune", "edit", "sweep", "choose")
        unknown = set(recommended) - set(sections)
        _require(not unknown, "sections", sorted(unknown), ", ".join(sections))
        tune, edit, sweep, choose = (recommended.get(section, {}) for section in sections)
        return cls(TuneConfig(**tune), EditConfig(**edit), SweepConfig(**sweep), ChooseConfig(**choose))
