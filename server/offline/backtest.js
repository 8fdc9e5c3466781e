"use strict";
// Draws the charts that stand as JSON in the page. Colours come from the style sheet at every drawing, so that a
// change between light and dark needs only a redraw.
(() => {
  const HEIGHT = 280, FONT = "12px system-ui, sans-serif";
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const price = (u, value) => (value == null ? "—" : value.toLocaleString("en", { maximumSignificantDigits: 5 }));

  function axis(label) {
    const grid = { stroke: () => colour("--line"), width: 1 };
    return { stroke: () => colour("--soft"), grid, ticks: grid, font: FONT, label, labelFont: FONT, labelSize: label ? 20 : 0 };
  }

  // Days as dates, what is finer as hours: as the file writes them.
  function moments(u, ticks, at, space, step) {
    const iso = ticks.map((seconds) => new Date(seconds * 1e3).toISOString());
    return iso.map((text) => (step < 86400 && !text.includes("T00:00") ? text.slice(11, 16) : text.slice(0, 10)));
  }

  function line(label, hue, dash = [], width = 1.5) {
    return { label, stroke: () => colour(hue), width, dash, value: price, points: { show: false } };
  }

  // A band fills from its first series down to its second: the outermost pair first, each pair over the one around it.
  function fan(spec) {
    const last = spec.levels.length - 1, middle = last / 2;
    const quantile = (level, i) => line(String(level), "--model", i === middle ? [6, 3] : [], i === middle ? 1.5 : 0);
    const bands = spec.levels.slice(0, Math.ceil(middle)).map((_, i) => ({ series: [last - i + 1, i + 1], fill: () => colour("--band") }));
    return {
      data: [spec.x, ...spec.lines, spec.actual],
      options: {
        tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1e3), "Etc/UTC"),
        axes: [{ ...axis(), values: moments, space: 90 }, { ...axis(), size: 60 }],
        series: [{ label: "at", value: "{YYYY}-{MM}-{DD} {HH}:{mm}" }, ...spec.levels.map(quantile), line("actual", "--actual")],
        bands,
      },
    };
  }

  function hours(spec) {
    return {
      data: [spec.x, spec.model, spec.naive],
      options: {
        scales: { x: { time: false }, y: { range: (u, low, high) => [0, high > 0 ? high * 1.08 : 1] } },
        axes: [{ ...axis(spec.what), incrs: [1, 2, 3, 6, 12] }, { ...axis(), size: 60 }],
        series: [{ label: "at", value: (u, v) => v ?? "—" }, line("model", "--model", [], 2), line("naive", "--naive", [6, 3], 2)],
      },
    };
  }

  const kinds = { fan, hours };
  const places = [...document.querySelectorAll(".plot")];
  const charts = JSON.parse(document.getElementById("charts").textContent).map((spec, i) => {
    const { data, options } = kinds[spec.kind](spec);
    return new uPlot({ width: places[i].clientWidth, height: HEIGHT, ...options }, data, places[i]);
  });
  new ResizeObserver(() => charts.forEach((chart, i) => chart.setSize({ width: places[i].clientWidth, height: HEIGHT })))
    .observe(document.querySelector("main"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => chart.redraw(false)));
})();
