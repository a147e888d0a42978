"""Explain a recommendation in plain words: its reason, the first task to break, and the limits of the numbers.

A setting is a method with its budget; a cell is a task at a context length under a protocol (question asked before or
after the compression). "Exact" is the cache that keeps every token. A loss is exact's score minus the setting's. A
setting holds on a cell if the tolerated loss is excluded, and breaks there if a loss is certain. It is safe if it and
every larger budget of its method hold on every cell.
"""

from collections import Counter, defaultdict

from kvfloor.audit.criterion import Standard
from kvfloor.audit.format import bytes_text, counted, percent_text, points_text, smaller_text
from kvfloor.audit.recommend import WEAK_EXACT_SCORE, Judged, Recommendation


def why(answer: Recommendation) -> str:
    """Return one paragraph with the reason for the recommended setting, or the reason that none is recommended."""
    return _why_none(answer) if answer.chosen is None else _why_chosen(answer, answer.chosen)


def what_breaks(answer: Recommendation) -> tuple[str, ...]:
    """Return sentences on where quality is lost: one on the task that breaks first, then one per method.

    Each setting (method with budget) that certainly loses quality has a weakest cell. The task that breaks first is the
    most frequent task of these cells. A method's sentence names its smallest safe setting, and the next smaller setting
    with its weakest cell: the task, context length and protocol on which it breaks or is not shown to hold.
    """
    falling = Counter(one.weakest.task for one in answer.judged if one.verdict == "falls")
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
    """Return the limits of the audit's numbers, one sentence each.

    The sentences warn of few samples, of a low score of exact itself, and of a recommended setting (method with budget)
    whose peak bytes are no less than exact's bytes.
    """
    sentences = []
    standard = answer.standard
    n = min(row.n for row in answer.exact)
    if n < standard.samples_needed(standard.margin):
        needed = standard.samples_needed(standard.margin)
        sentences.append(
            f"With n = {n} samples per cell, even a setting that loses none of them cannot be shown to lose "
            f"less than {points_text(standard.margin)}; run at least {needed:,}."
        )
    elif standard.margin > 0.05:
        sentences.append(
            f"With n = {n} samples per cell the intervals are wide; to exclude a loss of 5 points, run at "
            f"least {standard.samples_needed(0.05):,} per cell."
        )
    if answer.weak:
        cells = "; ".join(str(row.cell) for row in answer.weak)
        sentences.append(
            f"Exact itself scores below {percent_text(WEAK_EXACT_SCORE)} on {cells}: a loss is hard to see there."
        )
    if answer.chosen and answer.chosen.peak_state_bytes >= max(row.exact_bytes for row in answer.exact):
        sentences.append(
            f"{answer.method} peaks at {bytes_text(answer.chosen.peak_state_bytes)}, no less than exact "
            "holds: it saves memory after the context is taken in, not meanwhile."
        )
    return tuple(sentences)


def _why_chosen(answer: Recommendation, chosen: Judged) -> str:
    standard = answer.standard
    if chosen.weakest.score < chosen.weakest.exact_score:
        weakest = f"its weakest cell is {chosen.weakest.cell}: {_scores(chosen)}"
    else:
        weakest = "no cell scores below exact"
    sentences = [
        f"{chosen.setting} holds {bytes_text(chosen.state_bytes)} where exact holds "
        f"{bytes_text(chosen.exact_bytes)}, {smaller_text(chosen.exact_bytes, chosen.state_bytes)} smaller "
        f"(mean of {counted(len(answer.exact), 'cell')}).",
        f"It loses less than {points_text(standard.margin)} to exact on every cell, with "
        f"{percent_text(standard.confidence)} confidence over the {counted(standard.methods, 'method')} "
        f"judged; {weakest}.",
    ]
    smaller = [one for one in answer.judged if one.state_bytes < chosen.state_bytes]
    if smaller:
        sentences.append(f"The next smaller setting is {smaller[-1].setting}: {_weakness(smaller[-1], standard)}.")
    else:
        sentences.append("No smaller setting was audited.")
    return " ".join(sentences)


def _why_none(answer: Recommendation) -> str:
    if len(answer.weak) == len(answer.exact):
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
    closest = max(answer.judged, key=lambda one: (standard.lower_end(one.weakest), -one.state_bytes))
    if all(one.verdict == "falls" for one in answer.judged):
        reason = "quality falls under every setting"
    elif closest.verdict == "holds":
        reason = "the settings that hold are not believed, because a larger budget of the same method does not"
    else:
        reason = f"no interval excludes a loss of {points_text(standard.margin)} on every cell"
    weakness = f"{closest.setting}: {_weakness(closest, standard)}"
    return f"no setting here is safe: {reason}. The closest is {weakness}."


def _along_budgets(settings: list[Judged], standard: Standard) -> str:
    """Name one method's smallest safe setting, and the first setting below it that is not safe, in one sentence.

    `settings` are the verdicts on the method's settings (the method with each budget), from the largest budget down.
    """
    believed = [one.setting for one in settings if one.believed]
    broken = next((one for one in settings if one.verdict != "holds"), None)
    if broken is None:
        return f"{believed[-1]} holds; nothing smaller of this method was audited."
    weakness = f"{broken.setting}: {_weakness(broken, standard)}."
    return f"{believed[-1]} holds; {weakness}" if believed else weakness


def _weakness(one: Judged, standard: Standard) -> str:
    """Describe a setting's weakest cell (task, context length, protocol), and its scores there."""
    cell = one.weakest.cell
    if one.verdict == "falls":
        return f"it breaks on {cell}, {_scores(one)}"
    if one.verdict == "holds":
        return f"it holds, weakest on {cell}, {_scores(one)}"
    loss = points_text(-standard.lower_end(one.weakest))
    return f"it is not shown to hold on {cell}, {_scores(one)}; a loss of {loss} cannot be excluded"


def _scores(one: Judged) -> str:
    row = one.weakest
    return f"{percent_text(row.score)} right where exact has {percent_text(row.exact_score)} (n = {row.n})"
