// Line charts and fan charts as SVG. INVARIANT: values become coordinates and text, never markup.

const SVG = "http://www.w3.org/2000/svg";

function draw(tag, attributes, parent, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

export function formatNumber(value) {
  if (value === null || Number.isNaN(value)) return "-";
  const size = Math.abs(value);
  if (size >= 1e4) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

function path(points) {
  let text = "", open = false;
  for (const [x, y] of points) {
    if (y === null) { open = false; continue; }
    text += (open ? "L" : "M") + x.toFixed(1) + " " + y.toFixed(1);
    open = true;
  }
  return text;
}

function niceTop(value) {
  if (!(value > 0)) return 1;
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * [1, 2, 5, 10].find((each) => each * unit >= value);
}

// series: one to three lists of numbers or null, equally spaced, the last one now.
export function drawLines(series, slots) {
  const width = 300, height = 92, left = 34, top = 8, bottom = 16;
  const found = series.flat().filter((value) => value !== null && !Number.isNaN(value));
  const most = niceTop(Math.max(0, ...found));
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  const x = (at, count) => left + (width - left) * (slots - count + at) / (slots - 1);
  const y = (value) => top + (height - top - bottom) * (1 - value / most);
  for (const value of [0, most]) {
    draw("line", { class: "axis", x1: left, x2: width, y1: y(value), y2: y(value) }, svg);
    draw("text", { x: left - 4, y: y(value) + 4, "text-anchor": "end" }, svg, formatNumber(value));
  }
  draw("text", { x: left, y: height - 3 }, svg, "5 min ago");
  draw("text", { x: width, y: height - 3, "text-anchor": "end" }, svg, "now");
  series.forEach((values, i) => {
    const points = values.map((value, at) => [x(at, values.length), value === null || Number.isNaN(value) ? null : y(value)]);
    draw("path", { class: ["first", "second", "third"][i], d: path(points) }, svg);
  });
  return svg;
}

// history: numbers or null; levels: { "0.1": [...], ... } of the steps that follow it.
export function drawFan(history, levels, name) {
  const width = 900, height = 300, left = 52, top = 10, bottom = 24;
  const names = Object.keys(levels).sort((a, b) => a - b);
  const ahead = levels[names[0]].length, shown = history.slice(-3 * ahead);
  const numbers = [...shown, ...names.flatMap((each) => levels[each])].filter((value) => typeof value === "number");
  let low = Math.min(...numbers), high = Math.max(...numbers);
  if (low === high) { low -= 1; high += 1; }
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name });
  const count = shown.length + ahead;
  const x = (at) => left + (width - left - 8) * at / Math.max(1, count - 1);
  const y = (value) => top + (height - top - bottom) * (high - value) / (high - low);
  for (const value of [low, (low + high) / 2, high]) {
    draw("line", { class: "axis", x1: left, x2: width, y1: y(value), y2: y(value) }, svg);
    draw("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, svg, formatNumber(value));
  }
  const line = (values, from) => values.map((value, i) => [x(from + i), typeof value === "number" ? y(value) : null]);
  for (let i = 0; i < Math.floor(names.length / 2); i++) {
    const upper = line(levels[names[names.length - 1 - i]], shown.length), lower = line(levels[names[i]], shown.length);
    draw("path", { class: "band", d: path([...upper, ...lower.reverse()]) + "Z" }, svg);
  }
  draw("path", { class: "past", d: path(line(shown, 0)) }, svg);
  draw("path", { class: "first", d: path(line(levels[names[Math.floor(names.length / 2)]], shown.length)) }, svg);
  draw("text", { x: left, y: height - 6 }, svg, `${shown.length} steps of history`);
  draw("text", { x: width - 8, y: height - 6, "text-anchor": "end" }, svg, `${ahead} steps ahead, levels ${names.join(", ")}`);
  return svg;
}
