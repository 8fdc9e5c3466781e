"use strict";
// Draws the charts that stand as JSON in the page. Colours come from the style sheet at every drawing, so that a
// change between light and dark needs only a redraw.
(() => {
  const HEIGHT = 280, FONT = "12px system-ui, sans-serif";
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const OPAQUE = 0.5; // of the innermost band, which all wider ones lie under: as in the legend
  const price = (value) => (value == null ? "—" : value.toLocaleString("en", { maximumSignificantDigits: 5 }));

  function axis(label, more) {
    const grid = { stroke: () => colour("--line"), width: 1 };
    return { stroke: () => colour("--soft"), grid, ticks: grid, font: FONT, label, labelFont: FONT, labelSize: 20, ...more };
  }

  // Days as dates, what is finer as hours: as the file writes them.
  function moments(u, ticks, at, space, step) {
    const iso = ticks.map((seconds) => new Date(seconds * 1e3).toISOString());
    return iso.map((text) => (step < 86400 && !text.includes("T00:00") ? text.slice(11, 16) : text.slice(0, 10)));
  }

  const line = (hue, dash = [], width = 1.5) => ({ stroke: () => colour(hue), width, dash, points: { show: false } });

  // "#1c5fc4" as a colour that lets so much of what is under it through.
  function thin(hue, opacity) {
    return hue + Math.round(255 * opacity).toString(16).padStart(2, "0");
  }

  // A band fills from its first series down to its second: the outermost pair first, each pair over the one around it.
  function fan(spec) {
    const last = spec.levels.length - 1, middle = last / 2, pairs = Math.ceil(middle);
    const opacity = 1 - (1 - OPAQUE) ** (1 / Math.max(pairs, 1));
    const quantile = (level, i) => (i === middle ? line("--middle", [6, 3], 2) : line("--model", [], 0));
    const bands = spec.levels.slice(0, pairs).map((_, i) => ({ series: [last - i + 1, i + 1], fill: () => thin(colour("--model"), opacity) }));
    return {
      data: [spec.x, ...spec.lines, spec.actual],
      time: (seconds) => new Date(seconds * 1e3).toISOString().slice(0, 16).replace("T", " "),
      options: {
        tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1e3), "Etc/UTC"),
        axes: [axis(`date, ${spec.clock}`, { values: moments, space: 90, size: 36 }), axis(`price, ${spec.unit}`, { size: 50 })],
        series: [{}, ...spec.levels.map(quantile), line("--actual")],
        bands,
      },
    };
  }

  function hours(spec) {
    const where = spec.what === "hour of the day" ? `${spec.what}, ${spec.clock}` : spec.what;
    return {
      data: [spec.x, spec.model, spec.naive],
      time: String,
      options: {
        scales: { x: { time: false }, y: { range: (u, low, high) => [0, high > 0 ? high * 1.08 : 1] } },
        axes: [axis(where, { incrs: [1, 2, 3, 6, 12], space: 30, size: 36 }), axis(`error, ${spec.unit}`, { size: 50 })],
        series: [{}, line("--model", [], 2), line("--naive", [6, 3], 2)],
      },
    };
  }

  // What the pointer or the arrow keys stand at is written into the legend.
  function read(legend, time) {
    return (u) => {
      const at = u.cursor.idx, value = (series) => price(u.data[series][at]);
      for (const place of legend.querySelectorAll("output")) {
        const { low, high, series } = place.dataset;
        if (at == null) place.textContent = "";
        else if (low) place.textContent = `${value(low)} to ${value(high)}`;
        else place.textContent = series ? value(series) : time(u.data[0][at]);
      }
    };
  }

  function step(chart) {
    return (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key], all = chart.data[0];
      if (!way) return;
      event.preventDefault();
      const now = chart.cursor.idx ?? (way > 0 ? -1 : all.length), next = Math.min(all.length - 1, Math.max(0, now + way));
      chart.setCursor({ left: chart.valToPos(all[next], "x"), top: 0 });
    };
  }

  const kinds = { fan, hours };
  const places = [...document.querySelectorAll(".plot")];
  const charts = JSON.parse(document.getElementById("charts").textContent).map((spec, i) => {
    const { data, options, time } = kinds[spec.kind](spec), place = places[i];
    const hooks = { setCursor: [read(place.parentElement.querySelector(".legend"), time)] };
    const chart = new uPlot({ width: place.clientWidth, height: HEIGHT, legend: { show: false }, hooks, ...options }, data, place);
    place.addEventListener("keydown", step(chart));
    return chart;
  });
  new ResizeObserver(() => charts.forEach((chart, i) => chart.setSize({ width: places[i].clientWidth, height: HEIGHT })))
    .observe(document.querySelector("main"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => chart.redraw(false)));
})();
