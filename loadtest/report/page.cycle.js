"use strict";
// Draws the fans with one scenario on top, the same in every chart, and the map of correlations. Colours come from the
// style sheet at every drawing, so that a change between light and dark needs only a redraw.
(() => {
  const HEIGHT = 220, FONT = "12px system-ui, sans-serif", LABELLED = 11; // pixels of a cell, from which on every product has its name beside it
  const data = JSON.parse(document.getElementById("charts").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const element = (id) => document.getElementById(id);
  const steps = data.times.length / 2; // as many before the forecast as in it
  const number = (v) => (v == null ? "—" : v.toLocaleString("en", { maximumFractionDigits: Math.abs(v) < 100 ? 2 : 0 }));
  const two = (n) => String(n).padStart(2, "0");
  const stamp = (u, t) => {
    if (t == null) return "—";
    const at = new Date(t * 1e3);
    return `${two(at.getUTCMonth() + 1)}-${two(at.getUTCDate())} ${two(at.getUTCHours())}:${two(at.getUTCMinutes())}`;
  };
  const ahead = (values) => [...Array(steps).fill(null), ...values];
  const behind = (values) => [...values.slice(0, steps), ...Array(steps).fill(null)];
  let chosen = 0;

  // Under the fan: every scenario as a thread.
  function threads(scenarios) {
    return (u) => {
      if (!element("all").checked) return;
      const { ctx } = u, { left, top, width, height } = u.bbox;
      ctx.save();
      ctx.beginPath();
      ctx.rect(left, top, width, height);
      ctx.clip();
      ctx.strokeStyle = colour("--thread");
      ctx.lineWidth = devicePixelRatio;
      for (const scenario of scenarios) {
        ctx.beginPath();
        scenario.forEach((v, i) => ctx.lineTo(u.valToPos(data.times[steps + i], "x", true), u.valToPos(v, "y", true)));
        ctx.stroke();
      }
      ctx.restore();
    };
  }

  function axis(more) {
    const grid = { stroke: () => colour("--line"), width: 1 };
    return { stroke: () => colour("--soft"), grid, ticks: grid, font: FONT, ...more };
  }

  // The y axis spans what is drawn as threads too.
  function range(chart) {
    const every = [chart.prices, ...chart.quantiles, ...chart.scenarios].flat().filter((v) => v != null);
    const low = every.reduce((a, b) => Math.min(a, b)), high = every.reduce((a, b) => Math.max(a, b));
    const room = (high - low || 1) * 0.04;
    return [low - room, high + room];
  }

  function fan(chart, place) {
    const levels = data.levels, middle = levels.length >> 1;
    const value = (u, v) => number(v);
    const quantile = (level, i) => ({
      label: i === middle ? "median" : `${+(100 * level).toPrecision(4)} %`, width: i === middle ? 2 : 0, dash: [6, 4], value,
      stroke: () => colour("--hue0"), points: { show: false }, class: i === middle ? undefined : "quiet",
    });
    const line = (label, name, more) => ({ label, stroke: () => colour(name), width: 2, value, points: { show: false }, ...more });
    const bands = levels.slice(0, middle).map((_, i) => ({ series: [levels.length - i, i + 1], fill: () => colour("--band") }));
    const span = range(chart);
    const options = {
      width: place.clientWidth, height: HEIGHT, tzDate: (t) => uPlot.tzDate(new Date(t * 1e3), "Etc/UTC"),
      scales: { x: { time: true }, y: { range: () => span } },
      axes: [axis({ values: (u, ticks) => ticks.map((t) => stamp(u, t).slice(6) === "00:00" ? stamp(u, t).slice(0, 5) : stamp(u, t).slice(6)), space: 60 }),
        axis({ size: (u, ticks) => 16 + 7 * Math.max(3, ...(ticks ?? []).map((tick) => tick.length)), values: (u, ticks) => ticks.map(number) })],
      series: [{ label: "at", value: stamp }, ...levels.map(quantile),
        line("price", "--ink"), line("came", "--ink", { dash: [2, 3] }), line("scenario", "--hue1", { width: 2.5 })],
      bands, cursor: { sync: { key: "steps" }, points: { show: false } },
      hooks: { drawClear: [threads(chart.scenarios)] },
    };
    const came = ahead(chart.prices.slice(steps));
    came[steps - 1] = chart.prices[steps - 1];
    const columns = [data.times, ...chart.quantiles.map(ahead), behind(chart.prices), came, ahead(chart.scenarios[0])];
    return new uPlot(options, columns, place);
  }

  function figure(chart) {
    const made = document.createElement("figure"), title = document.createElement("h3"), place = document.createElement("div");
    title.textContent = data.unit ? `${chart.name}, ${data.unit}` : chart.name;
    place.className = "plot";
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", `${chart.name}: quantiles and scenarios of the next ${steps} steps`);
    made.append(title, place);
    document.querySelector(".fans").append(made);
    return place;
  }

  // --- the scenario --------------------------------------------------------------------------------------------------

  const places = data.charts.map(figure);
  const charts = data.charts.map((chart, i) => fan(chart, places[i]));
  const count = data.charts[0].scenarios.length;

  function choose(i) {
    chosen = (i + count) % count;
    element("scenario").value = chosen + 1;
    element("which").textContent = chosen + 1;
    charts.forEach((u, k) => {
      const columns = u.data.slice();
      columns[columns.length - 1] = ahead(data.charts[k].scenarios[chosen]);
      u.setData(columns, false);
      u.redraw(false);
    });
  }

  // Mean prices of the first product's scenarios: where it is dear, what do the others do?
  const means = data.charts[0].scenarios.map((values) => values.reduce((a, b) => a + b, 0) / values.length);
  for (const [id, pick] of [["lowest", Math.min], ["highest", Math.max]]) {
    element(id).textContent = `${id} ${data.charts[0].name}`;
    element(id).addEventListener("click", () => choose(means.indexOf(pick(...means))));
  }
  element("scenario").addEventListener("input", (event) => choose(event.target.value - 1));
  element("back").addEventListener("click", () => choose(chosen - 1));
  element("on").addEventListener("click", () => choose(chosen + 1));
  element("all").addEventListener("change", () => choose(chosen));

  // --- the map -------------------------------------------------------------------------------------------------------

  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  function shade(percent) {
    const from = rgb(colour("--card")), to = rgb(colour(percent < 0 ? "--cold" : "--warm"));
    const share = Math.min(1, Math.abs(percent) / 100);
    return `rgb(${from.map((v, i) => Math.round(v + (to[i] - v) * share)).join(" ")})`;
  }

  const between = (name) => name.lastIndexOf(name.includes("/") ? "/" : "."); // as in region/product and region.product
  const group = (name) => name.slice(0, Math.max(0, between(name)));
  const own = (name) => name.slice(between(name) + 1);
  const map = element("map"), names = data.names;
  const starts = names.map((name, i) => i).filter((i) => i === 0 || group(names[i]) !== group(names[i - 1]));
  const grouped = starts.length > 1 && starts.length < names.length;
  let size = 0, margin = 0;

  function fit(canvas, width, height) {
    canvas.width = Math.round(width * devicePixelRatio);
    canvas.height = Math.round(height * devicePixelRatio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const ctx = canvas.getContext("2d");
    ctx.scale(devicePixelRatio, devicePixelRatio);
    return ctx;
  }

  function drawMap() {
    const width = map.parentElement.clientWidth - 34;
    margin = (width - 108) / names.length < LABELLED && grouped ? 48 : 108;
    size = Math.min(32, (width - margin) / names.length);
    const end = margin + size * names.length, ctx = fit(map, end + 1, end + 1);
    const shades = new Map();
    names.forEach((_, i) => names.forEach((__, j) => {
      const percent = data.together[i][j];
      if (!shades.has(percent)) shades.set(percent, shade(percent));
      ctx.fillStyle = shades.get(percent);
      ctx.fillRect(margin + j * size, margin + i * size, size - 0.5, size - 0.5);
    }));
    ctx.fillStyle = colour("--soft");
    ctx.textBaseline = "middle";
    for (const turned of [false, true]) label(ctx, turned);
    ctx.strokeStyle = colour("--ink");
    for (const i of starts.slice(1)) {
      const at = margin + i * size - 0.25;
      for (const ends of [[8, at, end, at], [at, 8, at, end]]) stroke(ctx, ...ends);
    }
  }

  function stroke(ctx, x0, y0, x1, y1) {
    ctx.lineWidth = 0.75;
    ctx.beginPath();
    ctx.moveTo(x0, y0);
    ctx.lineTo(x1, y1);
    ctx.stroke();
  }

  // Names along the left edge, or along the upper one, turned: groups outside, each product where there is room.
  function label(ctx, turned) {
    ctx.save();
    if (turned) {
      ctx.translate(0, 0);
      ctx.rotate(-Math.PI / 2);
      ctx.scale(-1, 1);
    }
    const write = (text, x, at) => {
      ctx.save();
      ctx.translate(x, at);
      if (turned) ctx.scale(-1, 1);
      ctx.textAlign = turned ? "left" : "right";
      ctx.fillText(text, 0, 0);
      ctx.restore();
    };
    const each = margin > 48 && size >= LABELLED;
    if (each || !grouped) {
      ctx.font = `${Math.min(12, Math.max(7, size - 2))}px system-ui, sans-serif`;
      names.forEach((name, i) => write(grouped ? own(name) : name, margin - 5, margin + (i + 0.5) * size));
    }
    if (grouped) {
      ctx.font = `600 ${FONT}`;
      starts.forEach((i, k) => {
        const next = starts[k + 1] ?? names.length;
        write(group(names[i]), each ? 36 : margin - 5, margin + ((i + next) / 2) * size);
      });
    }
    ctx.restore();
  }

  function drawRamp() {
    const ctx = element("ramp").getContext("2d");
    for (let x = 0; x < 160; x += 1) {
      ctx.fillStyle = shade(x / 0.8 - 100);
      ctx.fillRect(x, 0, 1, 10);
    }
  }

  map.addEventListener("pointermove", (event) => {
    const [j, i] = [event.offsetX, event.offsetY].map((at) => Math.floor((at - margin) / size));
    const value = data.together[i]?.[j];
    element("cell").textContent = value == null ? "\u00a0" : `${names[i]} and ${names[j]}: ${(value / 100).toFixed(2)}`;
  });

  const redraw = () => {
    charts.forEach((u) => u.redraw(false));
    drawMap();
    drawRamp();
  };
  new ResizeObserver(() => {
    charts.forEach((u, i) => u.setSize({ width: places[i].clientWidth, height: HEIGHT }));
    drawMap();
  }).observe(document.querySelector("main"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  redraw();
})();
