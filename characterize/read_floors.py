"""Compute the two floors of given keys and queries on real ones: the read floor and the volume floor, layer by layer.

    python -m characterize.read_floors [--keys "SmolLM2 2k"]

A text's first tokens but the last 256 are stored, and the queries of the last 256 are asked, each of which sees its own
token and those between too. Both floors say how many bytes any state holds that answers these queries within eta, in
each number of an answer, with probability 0.9, for the worst values in [-1, 1]. Each row sums them over the kv heads of
a layer, beside the bytes of the layer's keys and values in 16 bits; an audit takes the larger floor of each head. One
text, up to 10 layers of full attention. Five minutes on one core, once recorded. Gemma has terms to accept first, e.g.
by `kvfloor audit --model gemma3-270m --accept-terms`.
"""

from __future__ import annotations

from characterize.lib.real_keys import RealKeys, chosen, real
from characterize.lib.table import ResultTable
from kvfloor.audit.texts import SHIPPED
from kvfloor.floors.measured import causal_mass, readable_by, volume_by

ASKED, LAYERS = 256, 10
ETAS = (0.25, 0.1, 0.03, 0.01)
GEMMA = RealKeys("Gemma 2k", "gemma3-270m", SHIPPED[:1], 2048, 2048)
SOURCES = {source.name: source for source in (real("built-in 2k"), real("SmolLM2 2k"), GEMMA)}
FIELDS = ("keys", "layer", "eta", "read_bytes", "volume_bytes", "larger_bytes", "exact_bytes", "larger_share")


def main() -> None:
    names = chosen(__doc__, tuple(SOURCES))
    table = ResultTable(__file__, FIELDS, names, tuple(SOURCES))
    for name in names:
        source = SOURCES[name]
        for streams in source.streams(LAYERS):
            if streams.texts[0] != source.texts[0]:
                break
            rows, g, n, d = streams.q.shape
            stored = n - ASKED
            found = []
            for row in range(rows):
                q, k = streams.q[row, :, stored:], streams.k[row]
                later = causal_mass(q, k[stored:], scale=streams.scale)
                for eta in ETAS:
                    given = {"eta": eta, "dv": d, "scale": streams.scale, "later_mass": later}
                    bits = [one(k[:stored], q.reshape(g * ASKED, d), **given).bytes for one in (readable_by, volume_by)]
                    found.append((eta, *bits))
            exact = 2 * 2 * rows * stored * d
            for eta in ETAS:
                read, volume = ([one[i] for one in found if one[0] == eta] for i in (1, 2))
                larger = sum(map(max, read, volume))
                table.add(*(name, streams.places[0][0], eta, sum(read), sum(volume), larger, exact), larger / exact)
    table.save()


if __name__ == "__main__":
    main()
