"""Explain a recommendation in words: its reason, the tasks on which settings lose quality, the limits of the numbers.

A setting is a method with its budget; a cell is a task at a context length under a protocol (question asked before or
after the compression). "Exact" is the cache that keeps every token. A loss is exact's score minus the setting's. A
setting holds on a cell if a loss above the tolerated one is excluded, and breaks there if a loss is certain. A
divergence is a setting's mean KL to exact on texts, in nats per token. A setting is safe if it and every larger budget
of its method hold. A setting's weakest cell is the one with the worst verdict; of several such cells, the one with the
largest loss. A `Judged` is the verdict on one setting. A `Recommendation` is the recommended setting, with the verdicts
on all settings. A `Standard` has the tolerated loss and divergence, and the confidence.
"""

import math
from collections import Counter, defaultdict

from kvfloor.audit.criterion import Standard
from kvfloor.audit.format import bytes_text, counted, nats_text, number_of_nats, percent_text, points_text, smaller_text
from kvfloor.audit.nats import Divergence
from kvfloor.audit.recommend import WEAK_EXACT_SCORE, Judged, Recommendation
from kvfloor.audit.rows import Row


def why(answer: Recommendation) -> str:
    """Return the reason why `answer` recommends its setting, or why it recommends none, as one paragraph."""
    return _why_none(answer) if answer.chosen is None else _why_chosen(answer, answer.chosen)


def what_breaks(answer: Recommendation) -> tuple[str, ...]:
    """Return sentences on where the settings of `answer` lose quality: one on the weakest task, then one per method.

    The weakest task has the weakest cells of the most settings, counted over the settings that certainly lose quality
    on tasks. Its sentence is left out if there are no such settings. A method's sentence names its safe setting of
    smallest budget. It also names its setting of largest budget that is not shown to hold, with the weakest cell or the
    divergence of that one.
    """
    falling = Counter(
        one.weakest.task for one in answer.judged if one.weakest and (one.verdict, one.decided_by) == ("falls", "tasks")
    )
    sentences = []
    if falling:
        task, count = falling.most_common(1)[0]
        settings = counted(len(answer.judged), "setting")
        sentences.append(f"{task} breaks first: it is the weakest task of {count} of {settings}.")
    methods: dict[str, list[Judged]] = defaultdict(list)
    for one in reversed(answer.judged):
        methods[one.method].append(one)
    return (*sentences, *(_along_budgets(settings, answer.standard) for settings in methods.values()))


def cautions(answer: Recommendation) -> tuple[str, ...]:
    """Return the limits of the numbers behind `answer`, one sentence each; an empty tuple if there are none.

    The sentences warn if no task was run, if samples are few, if exact itself scores low, and if the recommended
    setting takes, at its peak, as many bytes as exact or more.
    """
    sentences = []
    standard = answer.standard
    if not answer.exact:
        sentences.append("No task was run: name tasks of your own use, or give prompts with answers.")
    if answer.exact and not answer.texts:
        sentences += _few_samples(standard, min(row.n for row in answer.exact))
    if answer.weak:
        cells = "; ".join(str(row.cell) for row in answer.weak)
        sentences.append(
            f"Exact itself scores below {percent_text(WEAK_EXACT_SCORE)} on {cells}: a loss is hard to see there."
        )
    exact_bytes = max(row.exact_bytes for row in answer.texts or answer.exact)
    if answer.chosen and answer.chosen.peak_state_bytes >= exact_bytes:
        sentences.append(
            f"{answer.method} peaks at {bytes_text(answer.chosen.peak_state_bytes)}, no less than exact "
            "holds: it saves memory after the context is taken in, not meanwhile."
        )
    return tuple(sentences)


def closest_setting(answer: Recommendation) -> Judged | None:
    """Return the verdict on the setting of `answer` that is nearest to being safe; None if no setting was judged.

    It is the setting whose divergence has the smallest upper confidence limit. If no text was read, it is the one whose
    loss on its weakest cell has the smallest upper confidence limit. Of equal ones, the one with the fewest bytes wins.
    """
    return max(answer.judged, key=lambda one: (_room(one, answer.standard), -one.state_bytes), default=None)


def next_smaller(answer: Recommendation, chosen: Judged) -> Judged | None:
    """Return the verdict on the setting with the next fewer bytes than `chosen`; None if there is none in `answer`."""
    return next((one for one in reversed(answer.judged) if one.state_bytes < chosen.state_bytes), None)


def _few_samples(standard: Standard, n: int) -> list[str]:
    """Return at most one sentence: a warning that n samples per cell are too few to exclude a small loss on tasks.

    It warns if n samples cannot exclude even the tolerated loss of `standard`, or if the tolerated loss is above 5
    points, which is not small. Otherwise the list is empty.
    """
    if n < standard.samples_needed(standard.margin):
        needed = standard.samples_needed(standard.margin)
        return [
            f"With n = {n} samples per cell, even a setting that loses none of them cannot be shown to lose "
            f"less than {points_text(standard.margin)}; run at least {needed:,}."
        ]
    if standard.margin > 0.05:
        return [
            f"With n = {n} samples per cell the intervals are wide; to exclude a loss of 5 points, run at "
            f"least {standard.samples_needed(0.05):,} per cell."
        ]
    return []


def _why_chosen(answer: Recommendation, chosen: Judged) -> str:
    sentences = [_saved(answer, chosen)]
    if chosen.divergence is None:
        sentences.append(_kept_on_tasks(answer, chosen))
    else:
        sentences.append(_kept_on_texts(answer, chosen.divergence))
        sentences.append("No task shows a loss." if answer.exact else "No task was run.")
    smaller = next_smaller(answer, chosen)
    if smaller:
        sentences.append(f"The next smaller setting is {smaller.setting}: {_weakness(smaller, answer.standard)}.")
    else:
        sentences.append("No smaller setting was audited.")
    return " ".join(sentences)


def _saved(answer: Recommendation, chosen: Judged) -> str:
    """Write a sentence that compares the bytes of `chosen`, the setting that `answer` recommends, with those of exact.

    Bytes are those in the model's dtype. If texts were read and the dtype does not have 16 bits, the sentence also
    compares the bytes that both would have in a 16-bit dtype. A second sentence follows if another safe setting would
    have the fewest bytes in that dtype.
    """
    times = f"{smaller_text(chosen.exact_bytes, chosen.state_bytes)} smaller"
    of = counted(len(answer.texts or answer.exact), "text" if answer.texts else "cell")
    halved, exact_halved, more = chosen.state_16_bit_bytes, chosen.exact_16_bit_bytes, ""
    if halved is not None and exact_halved is not None and exact_halved != chosen.exact_bytes:
        times += f", and {smaller_text(exact_halved, halved)} in a 16-bit model"
        safe = [(one.state_16_bit_bytes or math.inf, one.setting) for one in answer.judged if one.believed]
        size, least = min(safe)
        if least != chosen.setting and size < halved:
            more = (
                f" In a 16-bit model {least} is the smallest safe setting, with {bytes_text(size)} where "
                f"{chosen.setting} holds {bytes_text(halved)}."
            )
    return (
        f"{chosen.setting} holds {bytes_text(chosen.state_bytes)} where exact holds {bytes_text(chosen.exact_bytes)}, "
        f"{times} (mean of {of}).{more}"
    )


def _kept_on_tasks(answer: Recommendation, chosen: Judged) -> str:
    standard, row = answer.standard, chosen.weakest
    assert row is not None
    weakest = f"its weakest cell is {row.cell}: {_scores(row)}"
    if row.score >= row.exact_score:
        weakest = "no cell scores below exact"
    return (
        f"It loses less than {points_text(standard.margin)} to exact on every cell, with "
        f"{percent_text(standard.confidence)} confidence over the {counted(standard.methods, 'method')} judged; "
        f"{weakest}."
    )


def _kept_on_texts(answer: Recommendation, found: Divergence) -> str:
    standard = answer.standard
    assert standard.kl_limit is not None
    return (
        f"Its next-token distributions diverge from exact's by {nats_text(found.kl)} per token "
        f"({_interval(found)}; {percent_text(standard.confidence)} confidence over the "
        f"{counted(standard.methods, 'method')} judged), within the limit of {standard.kl_limit:g}: over "
        f"{found.tokens:,} tokens the likeliest token is the same for {_percent(found.same_top)}, and the perplexity "
        f"is {_percent(found.perplexity_ratio)} of exact's."
    )


def _why_none(answer: Recommendation) -> str:
    if not answer.texts and len(answer.weak) == len(answer.exact):
        return (
            f"no setting here is safe: exact itself scores below {percent_text(WEAK_EXACT_SCORE)} on every "
            "cell, so a loss could not be seen. Audit tasks that the model can do."
        )
    if not answer.judged:
        return (
            "no setting here is safe: none was measured on every cell with fewer bytes than exact. Give "
            "smaller budgets."
        )
    standard = answer.standard
    closest = closest_setting(answer)
    assert closest is not None
    if all(one.verdict == "falls" for one in answer.judged):
        reason = "quality falls under every setting"
    elif closest.verdict == "holds":
        reason = "the settings that hold are not believed, because a larger budget of the same method does not"
    elif closest.divergence is not None:
        reason = f"no interval lies within {standard.kl_limit:g} nats of exact"
    else:
        reason = f"no interval excludes a loss of {points_text(standard.margin)} on every cell"
    weakness = f"{closest.setting}: {_weakness(closest, standard)}"
    return f"no setting here is safe: {reason}. The closest is {weakness}."


def _along_budgets(settings: list[Judged], standard: Standard) -> str:
    """Name one method's safe setting of smallest budget, and that of largest budget that is not shown to hold.

    Both are in one sentence. `settings` are the verdicts on the method's settings (the method with each budget), from
    the largest budget down; `standard` is what they were judged by.
    """
    believed = [one.setting for one in settings if one.believed]
    broken = next((one for one in settings if one.verdict != "holds"), None)
    if broken is None:
        return f"{believed[-1]} holds; nothing smaller of this method was audited."
    weakness = f"{broken.setting}: {_weakness(broken, standard)}."
    return f"{believed[-1]} holds; {weakness}" if believed else weakness


def _room(one: Judged, standard: Standard) -> float:
    """Return minus the largest loss that is not excluded for a setting: it is larger, the closer the setting to safe.

    The largest loss is the upper confidence limit of the divergence. If no text was read, it is the upper confidence
    limit of the loss on the setting's weakest cell, at the confidence of `standard`.
    """
    if one.divergence is not None:
        return -one.divergence.kl_high
    assert one.weakest is not None
    return standard.lower_end(one.weakest)


def _weakness(one: Judged, standard: Standard) -> str:
    """Describe where a setting is weakest: by its divergence if texts decided the verdict, else by its weakest cell.

    `one` is the verdict on the setting. `standard` has the limit and the confidence that the description uses.
    """
    if one.decided_by == "texts":
        assert one.divergence is not None and standard.kl_limit is not None
        far = f"{nats_text(one.divergence.kl)} ({_interval(one.divergence)})"
        if one.verdict == "holds":
            return f"it diverges by {far}"
        if one.verdict == "falls":
            return f"it diverges by {far}, above the limit of {standard.kl_limit:g}"
        return f"it diverges by {far}, not shown to lie within the limit of {standard.kl_limit:g}"
    assert one.weakest is not None
    cell, scores = one.weakest.cell, _scores(one.weakest)
    if one.verdict == "falls":
        return f"it breaks on {cell}, {scores}"
    if one.verdict == "holds":
        return f"it holds, weakest on {cell}, {scores}"
    loss = points_text(-standard.lower_end(one.weakest))
    return f"it is not shown to hold on {cell}, {scores}; a loss of {loss} cannot be excluded"


def _scores(row: Row) -> str:
    return f"{percent_text(row.score)} right where exact has {percent_text(row.exact_score)} (n = {row.n})"


def _interval(found: Divergence) -> str:
    return f"{number_of_nats(found.kl_low)} to {number_of_nats(found.kl_high)}"


def _percent(share: float) -> str:
    """Write a share with one digit after the point, e.g. `95.5 %`."""
    return f"{100 * share:.1f} %"
