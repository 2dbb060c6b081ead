"""What planning tests share: random cost models, and every plan of a tiny step."""

from collections.abc import Iterator

from hypothesis import strategies as st

from megatron_ext.planning.cost_model import AttentionShape, CostModel, Curve

CURVES = st.builds(
    lambda latency, rate, bend: Curve((0.0, 40.0, 80.0), (latency, latency + 40 * rate, latency + 40 * rate * (1 + bend))),
    st.floats(0.0, 2.0),
    st.floats(0.0, 0.1),
    st.floats(0.0, 2.0),
)


@st.composite
def cost_models(draw: st.DrawFn) -> CostModel:
    """Costs of every kind, with free and expensive exchanges, and blocks beyond the heads, which are rings."""
    heads = draw(st.sampled_from([1, 2, 4, 64]))
    return CostModel(
        draw(st.integers(5, 40)),
        per_token=draw(st.floats(0.01, 1.0)),
        per_token_squared=draw(st.sampled_from([0.0, 0.01, 0.1])),
        per_pack=draw(st.sampled_from([0.0, 1.0, 10.0])),
        attention=AttentionShape(layers=1, query_heads=heads, kv_heads=draw(st.sampled_from([1, heads]))),
        all_to_all=tuple(draw(st.lists(CURVES, max_size=3))),
        ring_step=draw(st.just(Curve()) | CURVES),
    )


def partitions(count: int) -> Iterator[list[list[int]]]:
    """Every partition of 0 .. count - 1 into sets."""
    if count == 0:
        yield []
        return
    for smaller in partitions(count - 1):
        yield [*smaller, [count - 1]]
        for place in range(len(smaller)):
            yield [*smaller[:place], [*smaller[place], count - 1], *smaller[place + 1 :]]


def least_seconds(lengths: list[int], devices: int, cost: CostModel, in_rounds: bool, largest_degree: int | None = None) -> float:
    """Seconds of the best of all plans of whole documents: every partition into packs, every degree and every place of each."""
    degrees = cost.degrees(devices, largest_degree)
    best = float("inf")
    for packs in partitions(len(lengths)):
        options = []
        for pack in packs:
            tokens, work = sum(lengths[i] for i in pack), float(sum(cost.work(lengths[i]) for i in pack))
            fitting = [degree for degree in degrees if tokens <= cost.capacity(degree)]
            options.append([(degree, float(cost.pack_seconds(work, tokens, degree))) for degree in fitting])
        if all(options):
            best = min(best, _rounds(options, devices, best) if in_rounds else _makespan(options, (0.0,) * devices, best))
    return best


def _makespan(options: list[list[tuple[int, float]]], free: tuple[float, ...], best: float) -> float:
    """Least makespan of packs in the order of some list; every order is tried, every degree, every block."""
    if max(free) >= best:
        return best
    if not options:
        return max(free)
    for first in range(len(options)):
        rest = options[:first] + options[first + 1 :]
        for degree, seconds in options[first]:
            seen = set()
            for begin in range(0, len(free) - degree + 1, degree):
                block = free[begin : begin + degree]
                if degree == 1 and block in seen and max(len(each) for each in options) == 1:
                    continue
                seen.add(block)
                done = max(block) + seconds
                best = min(best, _makespan(rest, free[:begin] + (done,) * degree + free[begin + degree :], best))
    return best


def _rounds(options: list[list[tuple[int, float]]], devices: int, best: float) -> float:
    """Least sum of longest packs over rounds: every partition of packs into rounds, every degree that has room beside the others."""
    for rounds in partitions(len(options)):
        best = min(best, sum(_one_round([options[pack] for pack in each], devices) for each in rounds))
    return best


def _one_round(options: list[list[tuple[int, float]]], devices: int) -> float:
    """Least longest pack when all are computed at the same time. Aligned blocks have room whenever their sum does."""
    if not options:
        return 0.0
    least = float("inf")
    for degree, seconds in options[0]:
        if degree <= devices:
            least = min(least, max(seconds, _one_round(options[1:], devices - degree)))
    return least
