"""A plan as sentences, tables and charts, for the terminal, the browser and a file. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loadtest.plan.costs import Costs
from loadtest.plan.demand import Demand
from loadtest.plan.machine_choice import Offer, Promise, find_cheapest_alone
from loadtest.plan.miss_ratio_curves import MissRatioCurve
from loadtest.plan.prices import PriceTable, compare_published
from loadtest.plan.simulate import Machines, SimulationResult
from loadtest.report import render_document
from loadtest.report.charts import Axis, Chart, ChartLine, format_number
from loadtest.report.tables import ReportTable

MIB = 2**20
LOADING = 0.9  #: share of the loader threads' time beyond which loads wait for a thread
PERCENTILES = ("p50", "p90", "p99", "p99.9")


@dataclass(frozen=True, slots=True)
class PlanFindings:
    """The results of a plan: `sizes` in the order of their caches, `offers` with the cheapest first."""

    demand: Demand
    costs: Costs
    prices: PriceTable
    promise: Promise
    curves: Sequence[MissRatioCurve]
    sizes: Sequence[SimulationResult]
    offers: Sequence[Offer]

    @property
    def best(self) -> Offer | None:
        """The cheapest offer that reaches the targets."""
        return next((offer for offer in self.offers if offer.found is not None), None)

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values for a file."""
        machine, instances, alone = find_cheapest_alone(self.prices, len(self.demand.names), self.promise)
        return {
            "demand": {
                "said": self.demand.said,
                "models": len(self.demand.names),
                "bytes": self.demand.fleet_bytes,
                "requests_per_s": self.demand.rate,
            },
            "costs": {name: getattr(self.costs, name) for name in self.costs.__struct_fields__},
            "promise": asdict(self.promise),
            "sentences": list(self.sentences()),
            "miss_ratio_curves": [asdict(each) for each in self.curves],
            "cache_sizes": [asdict(each) for each in self.sizes],
            "machines": [_offer_as_json(offer) for offer in self.offers],
            "one_endpoint_per_model": {"machine": machine.name, "instances": instances, "monthly": alone},
        }

    def html(self) -> str:
        """Render the plan as one HTML file."""
        return render_document(
            "page.plan.html",
            self.charts(),
            title=self.demand.said,
            said=f"Costs: {self.costs.said}. Prices: {self.prices.said} ({self.prices.dated}).",
            kept=self.best is not None,
            sentences=list(self.sentences()),
            tables=self.tables(),
            bars=[
                (f"{o.nodes} x {o.machine.name}", o.monthly, self.prices.money(o.monthly))
                for o in self.offers
                if o.found
            ],
        )

    # --- in words ---------------------------------------------------------------------------------------------------

    def sentences(self) -> Iterator[str]:
        """Say how many models fit, the tail latency, and the cost."""
        models, best = len(self.demand.names), self.best
        yield f"{models:,} models weigh {_format_size(self.demand.fleet_bytes)} in the cache."
        if best is not None and best.found is not None:
            fits, cache = count_models_that_fit(self.demand, best.found.machines), best.found.machines.cache_bytes
            there = f"{best.needed} x {best.machine.name}, with {_format_size(cache)} of cache each"
            there += _format_regions(best.found.machines)
            yield f"{fits:,} of them fit on {there}."
            yield f"{_format_tail(best.found)}."
            spare = f", {best.nodes - best.needed} of them to spare" if best.nodes > best.needed else ""
            each = f"{best.nodes} x {best.machine.name}{spare}{_format_regions(best.found.machines)}"
            yield f"{each}: {self.prices.money(best.monthly)} a month."
        else:
            yield "No machine of the price table keeps the promise."
        machine, instances, alone = find_cheapest_alone(self.prices, models, self.promise)
        each = f"One endpoint per model, {instances} x {machine.name} each: {self.prices.money(alone)} a month"
        yield each + (f", {alone / best.monthly:,.0f} times as much." if best is not None else ".")

    # --- in numbers -------------------------------------------------------------------------------------------------

    def tables(self) -> list[ReportTable]:
        """Make the tables by cache size, by machine, and of one endpoint per model against one fleet."""
        found = [self._by_size(), self._by_machine()]
        if self.sizes and self.sizes[0].after is not None:
            found.insert(1, self._after())
        published = compare_published(self.prices)
        if published is not None:
            rows = [["one endpoint per model", self.prices.money(published.each)]]
            rows.append(["one fleet", self.prices.money(published.fleet)])
            found.append(ReportTable("As published", ["", "a month"], rows, says=published.said))
        return found

    def _by_size(self) -> ReportTable:
        head = ["cache", "models fit", "hit ratio", "cold", "refused", *(f"{p} ms" for p in PERCENTILES), "busy", "SLO"]
        rows = [self._row(found) for found in self.sizes]
        machines = self.sizes[0].machines
        where = f"{_format_count(machines.nodes, 'node')} of {_format_count(machines.workers, 'worker')}"
        where += _format_regions(machines)
        error = max(found.error for found in self.sizes)
        slow = "; loads wait for loader threads" if any(found.loading > LOADING for found in self.sizes) else ""
        sure = f"; hit ratios to {2 * error:.3f}, since some workers speak for others" if error else ""
        words = "cold: requests that wait for a load; busy: of the workers' time; SLO: met, or what misses the target"
        says = f"{where}, policy {machines.policy}; cache of a node{sure}{slow}. {words}"
        return ReportTable("By cache size", head, rows, says=says)

    def _row(self, found: SimulationResult) -> list[str]:
        cache = found.machines.cache_bytes
        fits = count_models_that_fit(self.demand, found.machines)
        shares = [f"{found.hit_ratio:.4f}", f"{found.cold:.2%}", f"{found.refused:.2%}"]
        tail = [format_number(found.ms[p]) for p in PERCENTILES]
        return [
            _format_size(cache),
            f"{fits:,}",
            *shares,
            *tail,
            f"{found.busy:.0%}",
            self.promise.missed(found) or "met",
        ]

    def _after(self) -> ReportTable:
        rows = [
            [
                _format_size(found.machines.cache_bytes),
                *(cell for each in (found, found.after) for cell in _format_hits(each)),
            ]
            for found in self.sizes
            if found.after is not None
        ]
        head = ["cache", "hit ratio", "p99 ms", "hit ratio after", "p99 ms after"]
        loss = self.sizes[0].machines.loss
        what = "a region" if loss is not None and loss.is_of_region else "a node"
        says = "the whole time, and what came after the loss; what was lost is in neither"
        return ReportTable(f"When {what} is lost", head, rows, says=says)

    def _by_machine(self) -> ReportTable:
        head = ["machine", "needed", "with spares", "a month", "hit ratio", "p99 ms", "why not"]
        rows = []
        for offer in self.offers:
            if offer.found is None:
                rows.append([offer.machine.name, "", "", "", "", "", offer.why])
                continue
            numbers = [f"{offer.found.hit_ratio:.4f}", format_number(offer.found.ms["p99"]), ""]
            counts = [str(offer.needed), str(offer.nodes), self.prices.money(offer.monthly)]
            rows.append([offer.machine.name, *counts, *numbers])
        says = f"{self.prices.said}, {self.prices.dated}; an example until you have put in your own"
        return ReportTable("By machine", head, rows, says=says)

    # --- in curves --------------------------------------------------------------------------------------------------

    def charts(self) -> list[Chart]:
        """Make the charts of miss ratio, latency and hit ratio by cache size."""
        size = Axis("cache of all nodes, MiB")
        misses = [
            ChartLine(each.policy, [b / MIB for b in each.cache_bytes], [100 * ratio for ratio in each.miss_ratio])
            for each in self.curves
        ]
        rate = min((each.rate for each in self.curves), default=1.0)
        error = max((max(each.error) for each in self.curves), default=0.0)
        how = "" if rate >= 1 else f"; samples of {rate:.2%} of the models, a standard error of {error:.2%} at most"
        drawn = [
            _build_chart("Miss ratio", f"% of requests whose model is absent{how}", size, Axis("%", "percent"), misses)
        ]
        caches = [found.machines.cache_bytes / MIB for found in self.sizes]
        lines = [ChartLine(p, caches, [found.ms[p] for found in self.sizes]) for p in PERCENTILES[:3]]
        if self.promise.p99_ms is not None:
            lines.append(ChartLine("p99 promised", caches, [self.promise.p99_ms] * len(caches)))
        node = Axis("cache of a node, MiB")
        drawn.append(_build_chart("Latency", "ms by cache size, logarithmic", node, Axis("ms", log=True), lines))
        return drawn


def count_models_that_fit(demand: Demand, machines: Machines) -> int:
    """Count the models that the caches hold: each as often as it has replicas, in whole slabs of rows of one size."""
    each = machines.cache_bytes // machines.workers // machines.slab_bytes
    slabs = each * machines.workers * machines.nodes / machines.replicas
    rows = np.maximum(1, machines.slab_bytes // demand.charge)
    return int(np.searchsorted(np.cumsum(1 / rows), slabs * (1 + 1e-9), side="right"))


def _build_chart(title: str, says: str, x: Axis, y: Axis, lines: list[ChartLine]) -> Chart:
    return Chart(title, says, x, y, lines, list(range(len(lines))))


def _format_hits(found: SimulationResult) -> list[str]:
    return [f"{found.hit_ratio:.4f}", format_number(found.ms["p99"])]


def _format_tail(found: SimulationResult) -> str:
    tail = ", ".join(f"{level} {format_number(found.ms[level])} ms" for level in ("p50", "p99", "p99.9"))
    return f"Hit ratio {found.hit_ratio:.1%}; {tail}"


def _offer_as_json(offer: Offer) -> dict[str, Any]:
    if offer.found is None:
        return {"machine": offer.machine.name, "why_not": offer.why}
    counts = {"needed": offer.needed, "nodes": offer.nodes, "monthly": offer.monthly}
    return {"machine": offer.machine.name, **counts, "found": asdict(offer.found)}


def _format_count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


def _format_regions(machines: Machines) -> str:
    return f" in each of {machines.regions} regions" if machines.regions > 1 else ""


def _format_size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", MIB)):
        if count >= size:
            return f"{count / size:,.4g} {unit}"
    return f"{count / 1024:,.4g} KiB"
