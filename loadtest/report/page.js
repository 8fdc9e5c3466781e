"use strict";
// Draws the charts that stand as JSON in the page. Colours come from the style sheet at every drawing, so that a
// change between light and dark, and printing, need only a redraw. No line is told by its colour alone: each has its dash.
(() => {
  const DASHES = [[], [8, 4], [2, 3], [12, 3, 2, 3], [16, 5], [5, 2, 1, 2, 1, 2]];
  const HEIGHT = 260, PRINTED_WIDTH = 640, FONT = "12px system-ui, sans-serif";
  const root = document.documentElement;
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function number(value) {
    if (value == null) return "—";
    const size = Math.abs(value);
    const digits = Number.isInteger(value) || size >= 100 ? 0 : Math.min(6, 2 - Math.floor(Math.log10(size)));
    return value.toLocaleString("en", { maximumFractionDigits: digits });
  }

  function percentile(rarity) {
    const digits = Math.max(0, Math.ceil(Math.log10(rarity) - 1e-9) - 2);
    return `${(100 * (1 - 1 / rarity)).toFixed(digits)} %`;
  }

  const onTicks = { number, percent: number, "one in": percentile };
  const inLegend = { number, percent: (v) => (v == null ? "—" : `${number(v)} %`) };
  inLegend["one in"] = (v) => (v == null ? "—" : `${percentile(v)} (1 in ${number(v)})`);

  function scale(axis, ofX) {
    if (axis.log) return ofX ? { time: false, distr: 3, range: (u, low, high) => [low, high] } : { distr: 3 };
    if (ofX) return { time: false };
    if (axis.near) return { range: (u, low, high) => [low - 0.1 * (high - low), high + 0.1 * (high - low)] };
    return { range: (u, low, high) => [0, axis.top ?? (high > 0 ? high * 1.08 : 1)] };
  }

  function axis(of, ofX) {
    const grid = { stroke: () => colour("--line"), width: 1 };
    const values = (u, ticks) => ticks.map((tick) => (tick == null ? "" : onTicks[of.kind](tick)));
    const common = { stroke: () => colour("--soft"), grid, ticks: grid, values, font: FONT };
    if (ofX) return { ...common, label: of.title, labelSize: 20, labelFont: FONT, space: of.kind === "one in" ? 60 : 45 };
    return { ...common, size: (u, ticks) => 20 + 7 * Math.max(4, ...(ticks ?? []).map((tick) => tick.length)) };
  }

  // uPlot's own markers know no dashes: a short sample of the line instead.
  function sample(marker, hue, dash) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    for (const [name, value] of Object.entries({ width: 34, height: 10 })) svg.setAttribute(name, value);
    const look = { x1: 0, x2: 34, y1: 5, y2: 5, "stroke-width": 2, "stroke-dasharray": dash.join(" ") };
    for (const [name, value] of Object.entries(look)) line.setAttribute(name, value);
    line.style.stroke = `var(--hue${hue})`;
    svg.append(line);
    marker.replaceChildren(svg);
  }

  function draw(spec, place) {
    const curve = (line, i) => ({
      label: line.name, width: 2, dash: DASHES[i], stroke: () => colour(`--hue${line.hue}`),
      points: { show: line.x.length < 30 }, value: (u, v) => inLegend[spec.y.kind](v),
    });
    const options = {
      width: place.clientWidth, height: HEIGHT,
      scales: { x: scale(spec.x, true), y: scale(spec.y, false) },
      axes: [axis(spec.x, true), axis(spec.y, false)],
      series: [{ label: "at", value: (u, v) => inLegend[spec.x.kind](v) }, ...spec.lines.map(curve)],
      cursor: { sync: { key: spec.x.title } },
    };
    const chart = new uPlot(options, uPlot.join(spec.lines.map((line) => [line.x, line.y])), place);
    const markers = chart.root.querySelectorAll(".u-series:not(:first-child) .u-marker");
    markers.forEach((marker, i) => sample(marker, spec.lines[i].hue, DASHES[i]));
    return chart;
  }

  const places = [...document.querySelectorAll(".plot")];
  const charts = JSON.parse(document.getElementById("charts").textContent).map((spec, i) => draw(spec, places[i]));
  const fit = () => charts.forEach((chart, i) => chart.setSize({ width: places[i].clientWidth, height: HEIGHT }));
  const redraw = () => charts.forEach((chart) => chart.redraw(false));

  new ResizeObserver(() => root.classList.contains("print") || fit()).observe(document.querySelector(".charts"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => {
    root.classList.add("print");
    charts.forEach((chart) => chart.setSize({ width: PRINTED_WIDTH, height: HEIGHT }));
    redraw();
  });
  addEventListener("afterprint", () => {
    root.classList.remove("print");
    fit();
    redraw();
  });
})();
