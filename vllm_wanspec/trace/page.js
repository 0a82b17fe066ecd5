"use strict";
window.addEventListener("error", (event) => { document.body.dataset.error = event.message; });

const data = JSON.parse(document.getElementById("data").textContent);
const { figures, steps, tree } = data;
const $ = (id) => document.getElementById(id);
const SVG = $("time").namespaceURI;
const OUTCOMES = { hit: "", caught: "◆", miss: "✕", beyond: "»", blind: "?", unlinked: "–" };
const SAID = {
  prefill: "the prompt's prefill",
  full: "as many drafts as asked for",
  short: "fewer drafts than asked for",
  branch: "drafts of the branch that the step before met",
  none: "no draft",
  hit: "stayed on the most probable path",
  caught: "left the most probable path, but a branch was there",
  miss: "left the tree",
  beyond: "went past the end of what was drafted",
  blind: "the tree still lacked the step before",
  unlinked: "no drafter was linked",
};
const FATES = {
  accepted: "accepted draft",
  foreseen: "foreseen, not verified as draft",
  caught: "branch that was hit",
  late: "right, but late",
  echo: "echo of a commit",
  rejected: "rejected by the target",
  unused: "never needed",
  stale: "in flight when ruled out",
  left: "left over at the end",
  undrafted: "never drafted",
};
const WASTE = ["rejected", "unused", "stale", "left"];
const fateOf = (place) => data.names[tree.fate[place]];

// --- small helpers ---------------------------------------------------------------------------------------------------
// A `tip` is a function that gives the lines of the element's tooltip.
function draw(parent, name, attributes, tip) {
  const element = document.createElementNS(SVG, name);
  for (const key in attributes) {
    if (key === "text") element.textContent = attributes[key];
    else element.setAttribute(key, attributes[key]);
  }
  if (tip) element.tip = tip;
  parent.append(element);
  return element;
}
function put(parent, name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}
function number(value, digits = 0) {
  if (value === null) return "–";
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}
const count = (value, name) => `${number(value)} ${name}${value === 1 ? "" : "s"}`;
const ms = (value, digits = 1) => value === null ? "–" : `${number(value, digits)} ms`;
const share = (part, whole) => whole ? `${number(100 * part / whole, 1)} %` : "–";
function bytes(value) {
  if (value < 1e4) return `${number(value)} B`;
  return value < 1e6 ? `${number(value / 1e3, 1)} kB` : `${number(value / 1e6, 2)} MB`;
}
const text = (token) => data.texts[token] ?? String(token);
const named = (token) => data.texts[token] === undefined ? String(token) : `${data.texts[token]} (${token})`;
const shortened = (label, letters) => label.length > letters ? label.slice(0, letters - 1) + "…" : label;
const color = (name) => `--c: var(--${name})`;

function legend(id, entries) {
  return entries.map(([name, label, style, sign]) => {
    const entry = put($(id), "span", "");
    entry.style = color(name);
    put(entry, sign ? "em" : "i", style, sign);
    entry.append(label);
    return entry;
  });
}

// --- header ----------------------------------------------------------------------------------------------------------
function header() {
  document.title = `wanspec trace: ${figures.id}`;
  $("id").textContent = figures.id;
  const parts = [`on ${figures.process}`];
  parts[0] += figures.drafters.length ? `, drafted by ${figures.drafters.join(", ")}` : ", without a drafter";
  if (data.delays.up !== null) {
    parts.push(`median way of a commit to the drafter ${ms(data.delays.up)}, of nodes back ${ms(data.delays.down)}`);
  }
  if (data.shifts.length) {
    const moved = data.shifts.map((shift) => ms(shift)).join(", ");
    parts.push(`the drafter's clock was moved by ${moved}: as logged, messages arrived before they were sent`);
  }
  $("about").textContent = parts.join("; ");
  const cards = [
    [number(figures.tokens), "tokens"],
    [number(figures.steps), "steps after the prefill"],
    [number(figures.tokens_per_step, 2), "tokens per step"],
    [ms(figures.ms_per_token), "per token"],
    [share(figures.accepted, figures.offered), `of ${count(figures.offered, "draft")} accepted`],
    [number(figures.caught), "caught by a branch"],
    [number(figures.misses), `missed, ${number(figures.beyond)} past the end`],
    [number(figures.steps_without_draft), "steps without a draft"],
    [ms(1e3 * figures.waited_s), `in ${count(figures.waits, "wait")}`],
  ];
  for (const [value, label] of cards) {
    const card = put($("cards"), "div", "card");
    put(card, "b", "", value);
    put(card, "span", "", label);
  }
}

// --- what became of the drafts ---------------------------------------------------------------------------------------
function uses() {
  const fates = data.fates;
  for (const name of data.names) {
    if (!fates[name] || name === "echo") continue;
    const part = put($("use-bar"), "div", "");
    part.style = `${color(name)}; flex-grow: ${fates[name]}`;
    part.tip = () => [count(fates[name], "node"), FATES[name]];
    const entry = put($("use-list"), "span", "");
    entry.style = color(name);
    put(entry, "i", "");
    entry.append(`${FATES[name]}: ${number(fates[name])} (${share(fates[name], fates.drafted)})`);
  }
  const late = fates.late ? `, ${number(fates.late)} right but late` : "";
  const made = count(fates.echo, "echo").replace("echos", "echoes");
  const echoes = fates.echo ? `; besides, both sides made ${made} of committed tokens` : "";
  const drafted = `${count(fates.drafted, "node")} drafted, ${number(fates.used)} used, ${number(fates.wasted)} wasted`;
  const lines = [`${drafted}${late}${echoes}.`];
  if (data.passes !== null) lines.push(`The draft engine gave ${count(data.passes, "token")} in all branches.`);
  const each = figures.accepted ? ` (${bytes(figures.bytes_received / figures.accepted)} per accepted draft)` : "";
  lines.push(
    `${bytes(figures.bytes_received)} came in${each} and ${bytes(figures.bytes_sent)} went out,`,
    "counting messages alone, without frames and TLS.",
  );
  $("use-text").textContent = lines.join(" ");
}
