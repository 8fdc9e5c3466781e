// The operators' page. INVARIANT: text of the server becomes text of the page (textContent), never markup.

import { drawFan, drawLines, formatNumber } from "./shapes.js";

const READ_MS = 4000, LOOK_MS = 5000, SLOTS = 75, PAGE = 1000, ROW_PX = 35.2, BUSY_ROWS = 12;
// A listing costs the server time for each model: it is made every 15 s, of more than a thousand models every 15 ms for
// each, and while nothing has happened to any of them every five minutes.
const LIST_MS = 15000, EACH_MS = 15, STALE_MS = 300000;
const TIERS = ["host", "disk", "store"];
const at = (id) => document.getElementById(id);
const readings = [];
const built = new Map(); // of the rows in the document: index among the shown -> element
const listed = { at: -Infinity, when: "" }; // when the models were listed, and what had happened by then
let models = [], shown = [], sortBy = "model", downwards = false, open = null, rates = new Map();

function make(tag, text, parent, name) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  if (parent) parent.append(element);
  return element;
}

// --- the server ---------------------------------------------------------------------------------------------------

const encodeName = (name) => name.split("/").map(encodeURIComponent).join("/");

async function ask(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...(options.headers || {}), ...(token ? { Authorization: "Bearer " + token } : {}) };
  const reply = await fetch(path, { ...options, headers });
  const found = await reply.json().catch(() => ({}));
  if (reply.status === 401) at("access").hidden = false;
  if (!reply.ok) throw new Error(found.error?.message || `the server answered ${reply.status} to ${path}`);
  return found;
}

function showTrouble(error) {
  at("trouble").hidden = !error;
  at("trouble").textContent = error ? `${error.message}` : "";
}

async function repeat(work, everyMs) {
  for (;;) {
    if (document.visibilityState === "visible") {
      try { await work(); showTrouble(null); } catch (error) { showTrouble(error); }
    }
    await new Promise((done) => setTimeout(done, everyMs));
  }
}

// --- rates between two readings --------------------------------------------------------------------------------------

const total = (counts, keep = () => true) => Object.entries(counts).reduce((sum, [key, value]) => sum + (keep(key) ? value : 0), 0);

function change(before, now, family, keep) {
  const rise = total(now[family], keep) - total(before[family], keep);
  return rise >= 0 ? rise : total(now[family], keep); // a server that was started anew began at zero
}

function subtract(before, now) {
  const old = before?.counts ?? [];
  const anew = old.length !== now.counts.length || old.at(-1) > now.counts.at(-1);
  return { bounds: now.bounds, counts: now.counts.map((count, i) => count - (anew ? 0 : old[i])), sum: now.sum - (anew ? 0 : before.sum) };
}

function quantile({ bounds, counts }, level) {
  const all = counts.at(-1) || 0;
  if (!all) return null;
  let low = 0, before = 0;
  for (let i = 0; i < bounds.length; i++) {
    if (counts[i] >= level * all && counts[i] > before) return low + (bounds[i] - low) * (level * all - before) / (counts[i] - before);
    [low, before] = [bounds[i], counts[i]];
  }
  return bounds.at(-1);
}

const mean = (buckets) => (buckets.counts.at(-1) ? buckets.sum / buckets.counts.at(-1) : null);
const milliseconds = (seconds) => (seconds === null ? null : seconds * 1e3);

function summarise(before, now) {
  const seconds = Math.max(now.at - before.at, 1e-3);
  const times = subtract(before.request_seconds, now.request_seconds);
  const loads = Object.keys(now.load_seconds).map((tier) => subtract(before.load_seconds[tier], now.load_seconds[tier]));
  const load = loads.reduce((sum, each) => ({ ...each, counts: each.counts.map((count, i) => count + (sum?.counts[i] ?? 0)) }), null);
  const asked = change(before, now, "cache_requests");
  const share = (tier) => (now.cache_capacity_bytes[tier] ? 100 * (now.cache_bytes[tier] || 0) / now.cache_capacity_bytes[tier] : null);
  return {
    "requests a second": [change(before, now, "requests", (code) => code < 400) / seconds, change(before, now, "requests", (code) => code >= 400) / seconds],
    "request time, ms": [milliseconds(quantile(times, 0.5)), milliseconds(quantile(times, 0.99))],
    "cache hits, %": [asked ? 100 * change(before, now, "cache_requests", (result) => result === "hit") / asked : null],
    "load time, ms": load ? [milliseconds(quantile(load, 0.5)), milliseconds(quantile(load, 0.99))] : [null, null],
    "load time by tier, median, ms": TIERS.map((tier) => (now.load_seconds[tier] ? milliseconds(quantile(subtract(before.load_seconds[tier], now.load_seconds[tier]), 0.5)) : null)),
    "rows a batch": [mean(subtract(before.batch_rows, now.batch_rows))],
    "evictions a second": [change(before, now, "evictions") / seconds],
    "memory in use, %": [share("device"), share("disk")],
    "under way": [total(now.under_way)],
  };
}

const LEGENDS = {
  "load time by tier, median, ms": TIERS,
  "requests a second": ["answered", "failed"], "request time, ms": ["p50", "p99"], "load time, ms": ["p50", "p99"],
  "memory in use, %": ["device", "disk"],
};

function showCharts(points) {
  const box = at("charts");
  for (const name of Object.keys(points.at(-1))) {
    let figure = [...box.children].find((each) => each.dataset.name === name);
    if (!figure) { figure = make("figure", "", box); figure.dataset.name = name; }
    const latest = points.at(-1)[name], legend = LEGENDS[name] || [""];
    const caption = make("figcaption");
    make("span", name, caption);
    make("b", latest.map((value, i) => `${legend[i]} ${formatNumber(value)}`.trim()).join(", "), caption);
    figure.replaceChildren(caption, drawLines(latest.map((_, i) => points.map((point) => point[name][i])), SLOTS));
  }
}

function showProcesses(now) {
  at("processes").replaceChildren(...now.processes.map((each) => {
    const row = make("tr"), worker = each.kind === "worker";
    make("th", `${each.kind} ${each.index}`, row).scope = "row";
    make("td", each.up ? "up" : "down", row, each.up ? "" : "bad");
    make("td", each.device || "", row);
    make("td", worker ? formatNumber(now.under_way[each.index] || 0) : "", row, "number");
    make("td", worker ? formatNumber(now.loaded_models[each.index] || 0) : "", row, "number");
    make("td", String(each.incarnation - 1), row, "number");
    make("td", String(each.pid ?? "-"), row, "number");
    return row;
  }));
}

async function readOverview() {
  const now = await ask("/fleet/overview");
  at("server").textContent = `${now.store}, version ${now.version}, ${now.ready ? "ready" : "not ready"}`;
  at("server").className = now.ready ? "" : "bad";
  showProcesses(now);
  const last = readings.at(-1);
  if (last && now.at <= last.at) return; // the answer of the reading before: another viewer asked as well
  readings.push(now);
  if (readings.length > SLOTS + 1) readings.shift();
  if (readings.length > 1) showCharts(readings.slice(1).map((reading, i) => summarise(readings[i], reading)));
}

// --- the other nodes, where the server is one of a cluster -----------------------------------------------------------------

const nodesBefore = new Map(); // name -> what the node said it does, at the reading before

function describeNode(row) {
  const does = row.does, isUp = row.state === "here" || row.state === "linked";
  if (!isUp || !does) return { text: row.why ? `${row.state}: ${row.why}` : row.state, isWell: false };
  if (!does.ready) return { text: "not ready", isWell: false };
  if (does.workers_up < does.workers) return { text: `${does.workers_up} of ${does.workers} workers`, isWell: false };
  return { text: row.state, isWell: true };
}

function summariseNode(before, now) {
  const seconds = Math.max(now.at - before.at, 1e-3), asked = change(before, now, "cache_requests");
  const capacity = now.cache_capacity_bytes.device;
  return [
    change(before, now, "requests", (code) => code < 400) / seconds,
    change(before, now, "requests", (code) => code >= 400) / seconds,
    asked ? 100 * change(before, now, "cache_requests", (result) => result === "hit") / asked : null,
    milliseconds(quantile(subtract(before.request_seconds, now.request_seconds), 0.99)),
    total(now.loaded_models),
    capacity ? 100 * (now.cache_bytes.device || 0) / capacity : null,
    total(now.under_way),
  ];
}

async function readNodes() {
  if (!readings.at(-1)?.node) return;
  const { nodes, why } = await ask("/fleet/nodes");
  at("cluster").hidden = false;
  const states = nodes.map(describeNode), well = states.filter((each) => each.isWell).length;
  at("nodes-count").textContent = why || `${well} of ${nodes.length} nodes are well`;
  at("nodes-count").className = well < nodes.length || why ? "bad" : "";
  at("nodes").replaceChildren(...nodes.map((row, i) => {
    const line = make("tr"), does = row.does;
    make("th", row.name, line).scope = "row";
    make("td", states[i].text, line, states[i].isWell ? "" : "bad");
    const numbers = does ? summariseNode(nodesBefore.get(row.name) ?? does, does) : Array(7).fill(null);
    for (const value of numbers) make("td", formatNumber(value), line, "number");
    make("td", row.management, line);
    if (does) nodesBefore.set(row.name, does);
    return line;
  }));
}

// --- models ----------------------------------------------------------------------------------------------------------

const held = (row) => row.holders.filter((each) => each.bytes !== undefined);
const sum = (row, key) => row.holders.reduce((found, each) => found + (each.usage?.[key] || 0), 0);
const sinceListed = () => Math.max(0, performance.now() - listed.at) / 1e3;
const least = (row, key) => Math.min(...held(row).map((each) => each[key])) + sinceListed();
const findReason = (row) => row.reason || row.holders.find((each) => each.error)?.error || "";

function findState(row) {
  if (row.state) return row.state;
  const states = row.holders.map((each) => each.state);
  return states.includes("ready") ? "ready" : states[0] || "not loaded";
}

function formatAge(seconds) {
  if (!Number.isFinite(seconds)) return "";
  const [unit, name] = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]].find(([unit]) => seconds >= unit) || [1, "s"];
  return `${Math.floor(seconds / unit)} ${name}`;
}

const COLUMNS = {
  model: { of: (row) => row.model },
  state: { of: (row) => findState(row) + (row.pinned ? ", pinned" : "") },
  workers: { of: (row) => row.holders.map((each) => each.worker).join(",") },
  KiB: { of: (row) => held(row).reduce((found, each) => found + each.bytes, 0) / 1024, show: formatNumber, number: true },
  version: { of: (row) => (held(row)[0]?.version || "").slice(0, 13) },
  "requests/s": { of: (row) => rates.get(row.model) || 0, show: formatNumber, number: true },
  answers: { of: (row) => sum(row, "answers"), show: formatNumber, number: true },
  errors: { of: (row) => sum(row, "failures"), show: formatNumber, number: true },
  "loaded from": { of: (row) => [...new Set(held(row).map((each) => each.tier))].join(", ") },
  "load, ms": { of: (row) => Math.max(-1, ...held(row).map((each) => each.load_ms)), show: (ms) => (ms < 0 ? "" : formatNumber(ms)), number: true },
  "loaded ago": { of: (row) => least(row, "loaded_s_ago"), show: formatAge, number: true },
  "used ago": { of: (row) => least(row, "used_s_ago"), show: formatAge, number: true },
};

function showHeads() {
  at("heads").replaceChildren(...Object.entries(COLUMNS).map(([name, column]) => {
    const head = make("div", undefined, null, column.number ? "number" : "");
    head.setAttribute("role", "columnheader");
    head.setAttribute("aria-sort", name !== sortBy ? "none" : downwards ? "descending" : "ascending");
    const button = make("button", name + (name === sortBy ? (downwards ? " \u2193" : " \u2191") : ""), head);
    button.type = "button";
    button.addEventListener("click", () => {
      [sortBy, downwards] = [name, name === sortBy ? !downwards : Boolean(column.number)];
      showHeads();
      choose();
      at("heads").children[Object.keys(COLUMNS).indexOf(name)].querySelector("button").focus();
    });
    return head;
  }));
}

function choose() {
  const wanted = at("search").value.toLowerCase(), state = at("state").value, key = COLUMNS[sortBy].of;
  shown = models.filter((row) => row.model.toLowerCase().includes(wanted)
    && (!state || (state === "pinned" ? row.pinned : findState(row) === state)));
  const keys = new Map(shown.map((row) => [row, key(row)]));
  shown.sort((a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    return (x < y ? -1 : x > y ? 1 : a.model < b.model ? -1 : 1) * (downwards ? -1 : 1);
  });
  at("count").textContent = `${shown.length} of ${models.length} models that are resident, loading, failed or pinned`;
  at("grid").setAttribute("aria-rowcount", String(shown.length + 1));
  showRows();
}

// Only the rows in sight are elements, so that thousands scroll as a few do. Scrolling keeps those that stay in sight.
function showRows(anew = true) {
  const grid = at("grid"), rows = at("rows"), first = Math.max(0, Math.floor(grid.scrollTop / ROW_PX) - BUSY_ROWS);
  const last = Math.min(shown.length, Math.ceil((grid.scrollTop + grid.clientHeight) / ROW_PX) + BUSY_ROWS);
  const focused = document.activeElement?.dataset?.model;
  rows.style.height = `${shown.length * ROW_PX}px`;
  for (const [index, line] of built) {
    if (anew || index < first || index >= last) { line.remove(); built.delete(index); }
  }
  for (let index = last - 1; index >= first; index--) { // from below, so that each is put before the one that follows it
    if (built.has(index)) continue;
    const line = makeRow(shown[index], index);
    rows.insertBefore(line, built.get(index + 1) ?? null);
    built.set(index, line);
  }
  if (anew && focused) [...rows.querySelectorAll("button")].find((each) => each.dataset.model === focused)?.focus({ preventScroll: true });
}

function makeRow(row, index) {
  const line = make("div", undefined, null, "row");
  line.setAttribute("role", "row");
  line.setAttribute("aria-rowindex", String(index + 2));
  line.style.top = `${index * ROW_PX}px`;
  for (const [name, column] of Object.entries(COLUMNS)) {
    const value = column.of(row), text = column.show ? column.show(value) : value;
    const cell = make("div", name === "model" ? undefined : text, line, column.number ? "number" : "");
    cell.setAttribute("role", name === "model" ? "rowheader" : "gridcell");
    if (name === "state" && ["failed", "quarantined"].includes(findState(row))) cell.classList.add("bad");
    if (name === "model") {
      const button = make("button", text, cell);
      button.type = "button";
      button.dataset.model = row.model;
      button.title = row.model;
      button.addEventListener("click", () => openModel(row.model));
    }
  }
  return line;
}

function moveFocus(event) {
  const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
  const now = shown.findIndex((row) => row.model === document.activeElement?.dataset?.model);
  if (!step || (now < 0 && document.activeElement !== at("grid"))) return;
  event.preventDefault();
  const next = Math.min(shown.length - 1, Math.max(0, now < 0 ? 0 : now + step)), grid = at("grid");
  if (next * ROW_PX < grid.scrollTop) grid.scrollTop = next * ROW_PX;
  if ((next + 2) * ROW_PX > grid.scrollTop + grid.clientHeight) grid.scrollTop = (next + 3) * ROW_PX - grid.clientHeight;
  showRows();
  [...at("rows").querySelectorAll("button")].find((each) => each.dataset.model === shown[next]?.model)?.focus({ preventScroll: true });
}

// What tells that a model was loaded, evicted, swapped or asked, in the numbers of a reading.
function tellEvents(now) {
  if (!now) return "";
  const loads = Object.values(now.load_seconds).map((each) => each.counts.at(-1));
  return JSON.stringify([now.requests, now.cache_requests, now.loaded_models, now.evictions, loads, now.load_failures,
    now.loads_under_way, now.swaps, now.quarantined_models, now.processes.map((each) => [each.up, each.incarnation])]);
}

async function followModels() {
  const age = performance.now() - listed.at;
  if (age < Math.max(LIST_MS, EACH_MS * models.length)) return;
  if (age < STALE_MS && listed.when === tellEvents(readings.at(-1))) {
    rates.clear(); // nothing was asked since the models were listed
    showRows();
  } else await readModels();
}

async function readModels() {
  const when = tellEvents(readings.at(-1));
  const found = [], before = new Map(models.map((row) => [row.model, sum(row, "answers")])), since = readModels.at;
  let after = "";
  while (after !== null) {
    const page = await ask(`/fleet/models?limit=${PAGE}&after=${encodeURIComponent(after)}`);
    found.push(...page.models);
    after = page.next_after;
  }
  readModels.at = listed.at = performance.now();
  listed.when = when;
  const seconds = since ? (readModels.at - since) / 1e3 : 0;
  rates = new Map(seconds ? found.map((row) => [row.model, Math.max(0, sum(row, "answers") - (before.get(row.model) ?? 0)) / seconds]) : []);
  models = found;
  choose();
  showFailures();
}

function showFailures() {
  const bad = models.filter((row) => findReason(row)).slice(0, 50), box = at("failures");
  if (!bad.length) { box.replaceChildren(make("p", "No model has failed.")); return; }
  const table = make("table");
  for (const row of bad) {
    const line = make("tr", undefined, table);
    const button = make("button", row.model, make("td", undefined, line));
    button.type = "button";
    button.addEventListener("click", () => openModel(row.model));
    make("td", findState(row), line, "bad");
    make("td", findReason(row), line, "text");
  }
  const wide = make("div", undefined, null, "wide");
  wide.append(table);
  box.replaceChildren(wide);
}

// --- one model ---------------------------------------------------------------------------------------------------------

const ACTIONS = { load: "Load", pin: "Pin", unpin: "Unpin", unload: "Unload", reload: "Reload", rollback: "Roll back", follow: "Follow the store", release: "Release" };

async function act(verb, name, query = "") {
  at("outcome").textContent = `${ACTIONS[verb]}: the server has not answered yet.`;
  try {
    const answer = await ask(`/fleet/${verb}/${encodeName(name)}${query}`, { method: "POST" });
    at("outcome").textContent = `${ACTIONS[verb]}: done. ${JSON.stringify(answer)}`;
  } catch (error) {
    at("outcome").textContent = `${ACTIONS[verb]}: ${error.message}`;
  }
  await readModels().catch(showTrouble);
  await showModel(name);
}

async function showModel(name) {
  const row = models.find((each) => each.model === name) || { model: name, holders: [] };
  at("model-name").textContent = name;
  at("model-state").textContent = findState(row) + (row.pinned ? ", pinned" : "") + (findReason(row) ? `: ${findReason(row)}` : "");
  at("model-state").className = findReason(row) ? "bad" : "";
  at("actions").replaceChildren(...Object.entries(ACTIONS).map(([verb, text]) => {
    const button = make("button", text);
    button.type = "button";
    button.addEventListener("click", () => act(verb, name));
    return button;
  }));
  showTable("holders", row.holders.map((each) => ({ worker: each.worker, state: each.state, version: each.version, bytes: each.bytes,
    "loaded from": each.tier, "load, ms": each.load_ms, "loaded ago": formatAge(each.loaded_s_ago), "used ago": formatAge(each.used_s_ago), answers: each.usage?.answers, failures: each.usage?.failures })));
  const kept = await ask(`/fleet/versions/${encodeName(name)}`).catch(() => ({ versions: [] }));
  if (open !== name) return;
  showTable("versions", kept.versions.map((each) => ({ version: each.version, bytes: each.bytes,
    "served at": new Date(each.served_at * 1e3).toISOString().slice(0, 19) + "Z", held: each.held ? "by a rollback" : "" })));
  [...at("versions").querySelectorAll("tbody tr")].forEach((line, i) => {
    const button = make("button", "Serve it", make("td", undefined, line));
    button.type = "button";
    button.addEventListener("click", () => act("rollback", name, "?version=" + encodeURIComponent(kept.versions[i].version)));
  });
}

function showTable(id, rows) {
  if (!rows.length) { at(id).replaceChildren(make("p", "None.")); return; }
  const table = make("table"), head = make("tr", undefined, make("thead", undefined, table));
  for (const [name, value] of Object.entries(rows[0])) make("th", name, head, typeof value === "number" ? "number" : "").scope = "col";
  const lines = make("tbody", undefined, table);
  for (const row of rows) {
    const line = make("tr", undefined, lines);
    for (const value of Object.values(row)) make("td", value ?? "", line, typeof value === "number" ? "number" : "");
  }
  at(id).replaceChildren(table);
}

async function openModel(name) {
  open = name;
  at("outcome").textContent = at("answer").textContent = at("body").value = "";
  at("fan").replaceChildren();
  at("model").showModal();
  await showModel(name);
  try {
    const sample = await ask(`/fleet/sample/${encodeName(name)}`);
    if (open === name) at("body").value = JSON.stringify(sample.body);
  } catch (error) {
    at("outcome").textContent = error.message;
  }
}

async function tryModel() {
  const name = open, box = at("fan");
  box.replaceChildren();
  at("outcome").textContent = "The model has not answered yet.";
  try {
    const began = performance.now();
    const answer = await ask(`/fleet/try/${encodeName(name)}`, { method: "POST", body: at("body").value, headers: { "Content-Type": "application/json" } });
    at("outcome").textContent = `Answered after ${formatNumber(performance.now() - began)} ms.`;
    at("answer").textContent = JSON.stringify(answer, null, 1);
    const levels = answer.predictions?.[0]?.quantiles, request = JSON.parse(at("body").value);
    const series = request.instances?.[0]?.target ?? [];
    if (levels && !Array.isArray(Object.values(levels)[0][0])) box.append(drawFan(series, levels, `Forecast of ${name}`));
  } catch (error) {
    at("outcome").textContent = error.message;
  }
}

// --- the page ----------------------------------------------------------------------------------------------------------

at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value.trim());
  at("access").hidden = true;
  readModels().then(readOverview).catch(showTrouble);
});
at("filters").addEventListener("submit", (event) => {
  event.preventDefault();
  if (at("new-model").value.trim()) openModel(at("new-model").value.trim());
});
for (const id of ["search", "state"]) at(id).addEventListener("input", choose);
at("grid").addEventListener("scroll", () => requestAnimationFrame(() => showRows(false)));
at("grid").addEventListener("keydown", moveFocus);
at("try").addEventListener("click", tryModel);
at("model").addEventListener("close", () => { open = null; });
showHeads();
repeat(readOverview, READ_MS);
repeat(readNodes, READ_MS);
repeat(followModels, LOOK_MS);
