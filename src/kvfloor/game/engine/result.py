"""Judge a game: compare the bits certified from the answers with the bytes of state and message, and give a verdict.

In a game, Alice hides values in a method's state (the live state), and Bob restores a state from the message, i.e. the
bytes of Alice's state. A state is the memory of a KV-cache method. Certified bits are the number of hidden bits that a
state surely carries, as its answers to queries prove. A method that certifies more bits than its bytes can hold keeps
data elsewhere: it "cheats". Otherwise a game "holds" if enough answers are right, and "breaks" if too few are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from kvfloor.core.method import Method
from kvfloor.game.engine.certificates import ALPHA
from kvfloor.game.engine.decode import SUCCESS, Decoded
from kvfloor.game.engine.decode import judge as judge_rows
from kvfloor.game.engine.instance import Instance
from kvfloor.game.engine.play import Played, play_index
from kvfloor.game.engine.secret import Hidden

Verdict = Literal["holds", "breaks", "cheats"]


@dataclasses.dataclass(frozen=True)
class Result:
    """Record one game and its verdict. Sizes are in bytes, information in bits.

    method               the method as text
    barrier              name of the kind of game
    n                    hidden rows per stream, a row being the dv values that one query reads
    d, dv                widths of a key and of a value
    bits                 hidden bits per value: a whole number, or log2 of the number of levels of a number format
    eta                  relative error that answers may have
    seed                 seed of the public keys
    hidden_bits          bits hidden in all streams together
    certified_bits       bits that the message (the bytes of Alice's state) provably carries
    live_certified_bits  bits that Alice's own state (the live state) provably carries
    bits_per_value       certified bits per hidden value: the precision that the method keeps, at most `bits`
    bit_error            share of hidden bits decoded wrong; of hidden values, for levels of a number format
    row_success          share of rows answered within a factor 1±eta. row_success and bit_error are of the state
                         restored from the message, or of the live state if none could be restored
    alpha                1 - alpha is the confidence of the certified bits
    message_bytes        size of the message; payload_bytes of it are the state's tensors, the rest is header and digest
    state_bytes          size of Alice's state
    unseen_bits          bits of the message beyond those certified: as many could be hidden elsewhere, and no game that
                         was played would show it
    floor_bits           bits that any method must hold whose answers to these hidden values count as right for nine of
                         ten rows (`Instance.floor_bits`)
    verdict              cheats: more bits are certified than the bytes can hold, or the live and the restored state
                         answer differently, or no state could be restored from the message; breaks: row_success < 0.9;
                         else holds
    why                  the reason for the verdict, in words
    certificate          name of the proof of the certified bits: hard (from the number of wrong bits), erasure (the
                         same, in trusted rows only), log-loss (from the probabilities that the answers give to the
                         hidden values), rows (from the number of rows that are not answered), sampled rows (from the
                         wrong rows in a sample) or sampled lists (from its rows that are not answered). If all rows
                         were queried, it is the best of the first four
    details              further numbers, which differ from barrier to barrier: key family, window, probes, measured
                         sparsity ...
    rows_asked           number of rows that were queried
    hidden_seed          seed that repeats the run's hidden values
    seconds              duration of the game
    """

    method: str
    barrier: str
    n: int
    d: int
    dv: int
    bits: float
    eta: float
    seed: int
    alpha: float
    hidden_bits: float
    bit_error: float
    certified_bits: float
    live_certified_bits: float
    bits_per_value: float
    message_bytes: int
    payload_bytes: int
    state_bytes: int
    unseen_bits: float
    floor_bits: float
    verdict: Verdict
    why: str
    row_success: float
    rows_asked: int
    certificate: str
    details: dict[str, Any]
    hidden_seed: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of plain JSON types, name -> value."""
        return dataclasses.asdict(self)


def run(
    method: Method | str,
    instance: Instance,
    *,
    seed: int,
    hidden_seed: int | str | None = None,
    sampled: int | None = None,
    isolated: bool = True,
) -> Result:
    """Play an instance against a method, and return the result with its verdict.

    method       a method or its text, or the word "optimum": the known method of least memory for the instance
    instance     what Alice and Bob both know of the game: keys, stream and queries
    seed         seed of the public keys, recorded in the result
    hidden_seed  seed of the hidden values and of the sampled rows; None: fresh from the operating system
    sampled      number of rows to query, drawn with replacement; None: every row once
    isolated     True: Bob restores the state in a fresh process; False: in this process
    A row is the dv hidden values that one query reads.
    """
    played = play_index(method, instance, Hidden(hidden_seed), sampled, isolated=isolated)
    return conclude(played, instance, seed=seed)


def conclude(
    played: Played,
    instance: Instance,
    *,
    seed: int,
    judge: Callable[[Tensor, Played], Decoded] | None = None,
    **details: Any,
) -> Result:
    """Judge the answers of Alice's live state and of the restored state, and return the result with its verdict.

    The bits that the answers certify are compared with the bytes of the state and of the message.
    played      the game's answers and sizes
    instance    what Alice and Bob both know of the game: keys, stream and queries
    seed        seed of the public keys, recorded in the result
    judge       decoder for games that need another one than `decode.judge`. It is called with answers and `played`,
                compares the answers with the hidden values, and returns the certified bits and the shares of right
                answers. None: `decode.judge`
    details     name -> number, added in the result to `instance.details()`
    """
    bits, eta = instance.bits, instance.eta
    total = instance.copies * instance.rows

    def usual(answers: Tensor, played: Played) -> Decoded:
        return judge_rows(answers, played.hidden, bits, eta, sampled_from=total if played.sampled else None)

    judged = judge or usual
    live = judged(played.live, played)
    sent = live if played.restored is None or played.agree else judged(played.restored, played)
    certified = 0.0 if played.restored is None else sent.certified_bits
    verdict, why = judge_bytes(played, live, sent, certified)
    return Result(
        method=played.method, barrier=instance.barrier, n=instance.rows, d=instance.d, dv=instance.dv,
        bits=instance.value_bits, eta=eta, seed=seed, alpha=ALPHA,
        hidden_bits=instance.hidden_bits, bit_error=sent.bit_error,
        certified_bits=certified, live_certified_bits=live.certified_bits,
        bits_per_value=certified / (total * instance.dv), message_bytes=played.message_bytes,
        payload_bytes=played.payload_bytes, state_bytes=played.state_bytes,
        unseen_bits=max(0.0, 8 * played.message_bytes - certified), floor_bits=instance.floor_bits,
        verdict=verdict, why=why, row_success=sent.row_success, rows_asked=len(played.rows),
        certificate=sent.certificate, details=instance.details() | details, hidden_seed=played.hidden_seed,
        seconds=played.seconds,
    )  # fmt: skip


def judge_bytes(played: Played, live: Decoded, sent: Decoded, certified: float) -> tuple[Verdict, str]:
    """Return the verdict on a game ("holds", "breaks" or "cheats"), and the reason for the verdict in words.

    played     the sizes of message and state, and both states' answers
    live       certified bits and share of rows right, decoded from the answers of Alice's state
    sent       the same from the answers of the restored state
    certified  number of bits that the message provably carries; 0 if no state could be restored
    """
    message_bits, state_bits = 8 * played.message_bytes, 8 * played.state_bytes
    if played.restored is None:
        return "cheats", played.why
    if live.certified_bits > state_bits:
        return "cheats", f"the live state carries {live.certified_bits:.0f} bits, its bytes hold {state_bits}"
    if max(live.certified_bits, certified) > message_bits:
        most = max(live.certified_bits, certified)
        return "cheats", f"{most:.0f} bits were answered, the message holds {message_bits}"
    if not played.agree:
        return "cheats", "the live state and the one restored from the message answer differently"
    if sent.row_success < SUCCESS:
        return "breaks", f"{sent.row_success:.3f} of the rows are answered, {SUCCESS} are asked for"
    return "holds", f"{sent.row_success:.3f} of the rows are answered"
