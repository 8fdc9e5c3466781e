"use strict";
// Shows the routes of /openapi.json. INVARIANT: text of the server becomes text of the page, never markup.

const METHODS = ["get", "post", "put", "delete", "options"];

function make(tag, text, parent) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function quote(text) {
  return "'" + text.replaceAll("'", "'\\''") + "'";
}

function fillPath(path, values) {
  return path.replace(/\{(\w+)\}/g, (_, name) => values[name].split("/").map(encodeURIComponent).join("/"));
}

function readInputs(inputs) {
  const found = { path: {}, query: new URLSearchParams(), header: {} };
  for (const [parameter, input] of inputs) {
    if (parameter.in === "path") found.path[parameter.name] = input.value;
    else if (!input.value) continue;
    else if (parameter.in === "query") found.query.append(parameter.name, input.value);
    else found.header[parameter.name] = input.value;
  }
  return found;
}

function showRoute(parent, server, path, method, operation) {
  const box = make("details", "", parent);
  const summary = make("summary", "", box);
  make("b", method.toUpperCase(), summary);
  make("code", path, summary);
  make("span", " " + operation.summary, summary);
  const inputs = (operation.parameters || []).map((parameter) => {
    const label = make("label", parameter.name + (parameter.required ? " (needed) " : " "), box);
    return [parameter, make("input", "", label)];
  });
  const body = operation.requestBody ? make("textarea", "", box) : null;
  const command = make("pre", "", box);
  const token = () => document.getElementById("token").value;

  function describe() {
    const given = readInputs(inputs);
    const query = given.query.toString();
    const target = fillPath(path, given.path) + (query ? "?" + query : "");
    const parts = ["curl -i -X", method.toUpperCase(), quote(server + target)];
    for (const [name, value] of Object.entries(given.header)) parts.push("-H", quote(name + ": " + value));
    if (token()) parts.push('-H "Authorization: Bearer $TOKEN"');
    if (body) {
      parts.push("-H", quote("Content-Type: application/json"), "--data", quote(body.value || "{}"));
      given.header["Content-Type"] = "application/json";
    }
    command.textContent = parts.join(" ");
    return [target, given.header];
  }

  box.addEventListener("input", describe);
  box.addEventListener("toggle", describe);
  if (server !== location.origin) return;
  const button = make("button", "Send", box);
  const answer = make("pre", "", box);
  button.addEventListener("click", async () => {
    const [target, headers] = describe();
    if (token()) headers["Authorization"] = "Bearer " + token();
    try {
      const reply = await fetch(target, { method: method.toUpperCase(), headers, body: body ? body.value : undefined });
      answer.textContent = reply.status + "\n" + (await reply.text());
    } catch (error) {
      answer.textContent = "no answer: " + error;
    }
  });
}

async function show() {
  const main = document.getElementById("routes");
  const label = make("label", "Token, where the server asks for one ", null);
  const token = make("input", "", label);
  token.id = "token";
  token.type = "password";
  main.before(label);
  const found = await (await fetch("/openapi.json")).json();
  main.textContent = "";
  for (const tag of found.tags) {
    const section = make("section", "", main);
    make("h2", tag.description, section);
    for (const [path, item] of Object.entries(found.paths)) {
      const server = item.servers[0].url || location.origin;
      for (const method of METHODS) {
        const operation = item[method];
        if (operation && operation.tags[0] === tag.name) showRoute(section, server, path, method, operation);
      }
    }
  }
  document.getElementById("filter").addEventListener("input", (event) => {
    for (const box of main.querySelectorAll("details")) box.hidden = !box.textContent.includes(event.target.value);
  });
}

show();
