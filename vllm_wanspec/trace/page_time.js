// --- timeline: lanes over time ---------------------------------------------------------------------------------------
const CELL = 9, TOKEN_ROW = 11, LETTER = 5.6, LEFT = 14;
const typical = steps.map((step) => step.end - step.start).sort((a, b) => a - b)[steps.length >> 1] || 40;
let reaches = [];
let x, perMs;

function timeline() {
  const fit = Math.max(46 / typical, ($("time-scroll").clientWidth - 110) / data.end);
  perMs = Math.min(fit, 1e3) * 2 ** Number($("time-zoom").value);
  x = (at) => Number((LEFT + at * perMs).toFixed(2));
  const svg = $("time"), labels = $("time-labels"), end = x(data.end) + 90;
  svg.replaceChildren();
  labels.replaceChildren();
  let top = 0;
  const lane = (label, height, paint) => {
    const from = top;
    top += height;
    paint(svg, from, top);
    if (label) put(labels, "div", "", label).style.top = `${from + height / 2}px`;
    draw(svg, "path", { class: "grid", d: `M0 ${top + 3.5}H${end}` });
    top += 8;
  };
  const background = draw(svg, "g", {});
  lane("", 16, (_, from, to) => axis(svg, background, to, end));
  const stepsTop = top;
  lane("target's steps", steps.reduce((most, step) => Math.max(most, step.drafted.length), 2) * CELL + 30, stepLane);
  lane("committed", steps.reduce((most, step) => Math.max(most, step.tokens.length), 1) * TOKEN_ROW + 4, tokenLane);
  const stepsEnd = top - 8;
  lane("waits", 10, waitLane);
  lane("link", 14, linkLane);
  lane("live nodes", 30, liveLane);
  lane("nodes arriving", 30, arrivalLane);
  if (data.sessions.length) {
    lane("on the way", 54, wires);
    drafterLanes(lane);
  }
  reaches = steps.map((step, index) => {
    const left = index ? x(steps[index - 1].end) : x(0);
    const width = Math.max(2, x(step.end) - left);
    const box = { class: "reach", x: left, y: stepsTop - 6, width, height: stepsEnd - stepsTop + 8 };
    const reach = draw(svg, "rect", box, () => stepTip(step, index));
    reach.step = index;
    return reach;
  });
  for (const line of background.children) line.setAttribute("d", `${line.getAttribute("d")}V${top}`);
  svg.setAttribute("width", end);
  svg.setAttribute("height", top);
  labels.style.height = `${top}px`;
  select(selected);
}

function axis(svg, background, y, end) {
  const gaps = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000];
  const every = gaps.find((gap) => gap * perMs >= 64) ?? Math.ceil(data.end / 50);
  for (let at = 0; x(at) < end - 30; at += every) {
    draw(background, "path", { class: "grid", d: `M${x(at)} ${y}` });
    draw(svg, "text", { class: "axis", x: x(at) + 3, y: y - 4, text: every >= 1000 ? `${at / 1000} s` : `${at} ms` });
  }
}

function stepLane(svg, from, to) {
  const base = to - 2;
  steps.forEach((step, index) => {
    const left = x(step.start), width = Math.max(2, x(step.end) - left - 2), roomy = width > 22;
    const height = Math.max(1, step.drafted.length) * CELL, got = step.accepted * CELL, top = base - height;
    const bar = { x: left, width, rx: 2 };
    draw(svg, "rect", { ...bar, class: `step ${step.had}`, y: top, height, "data-step": index });
    if (got) draw(svg, "rect", { ...bar, class: `got ${step.had}`, y: base - got, height: got });
    let cuts = "";
    for (let cell = 1; cell < step.drafted.length; cell++) cuts += `M${left} ${base - cell * CELL}h${width}`;
    if (cuts) draw(svg, "path", { class: "cut", d: cuts });
    if (roomy && step.drafted.length) {
      const fraction = `${step.accepted}/${step.drafted.length}`;
      draw(svg, "text", { class: "count", x: left + width / 2, y: top - 4, text: fraction });
    }
    const sign = { class: `outcome ${step.outcome}`, x: x(step.end) - 4, y: top - (roomy ? 14 : 4) };
    if (OUTCOMES[step.outcome]) draw(svg, "text", { ...sign, text: OUTCOMES[step.outcome] });
  });
}

function tokenLane(svg, from) {
  let place = 0;
  steps.forEach((step, index) => {
    const letters = Math.floor((x(step.end) - (index ? x(steps[index - 1].end) : 0) - 4) / LETTER);
    step.tokens.forEach((token, row) => {
      const label = letters >= 3 ? shortened(text(token), letters) : "▪";
      const style = `fill: var(--${fateOf(place++)})`;
      draw(svg, "text", { class: "token", x: x(step.end) - 2, y: from + 8 + row * TOKEN_ROW, style, text: label });
    });
  });
}

function waitLane(svg, from) {
  for (const [start, stop] of data.waits) {
    const width = Math.max(2, (stop - start) * perMs);
    draw(svg, "rect", { class: "wait", x: x(start), y: from, width, height: 10, rx: 2 },
      () => [`waited ${ms(stop - start)} for drafts`, `until ${ms(stop)}`]);
  }
}

function linkLane(svg, from) {
  for (const [start, stop, drafter, ending] of data.links) {
    const until = x(stop ?? data.end), ended = stop === null ? "the end of the log" : ms(stop);
    draw(svg, "rect", { class: "link", x: x(start), y: from, width: Math.max(2, until - x(start)), height: 14, rx: 3 },
      () => [`session at ${drafter}`, `from ${ms(start)} to ${ended}`, ending]);
    const letters = Math.floor((until - x(start) - 8) / LETTER), label = { class: "axis", y: from + 10.5 };
    if (letters > 3) draw(svg, "text", { ...label, x: x(start) + 6, text: shortened(drafter, letters) });
    if (ending && ending !== "closed") {
      draw(svg, "path", { class: "link-end", d: `M${until} ${from - 2}v18` });
      draw(svg, "text", { ...label, x: until + 4, text: ending });
    }
  }
}

function liveLane(svg, from, to) {
  const points = data.arrivals.map((arrival) => [arrival[0], arrival[7]]);
  points.push(...steps.map((step) => [step.end, step.live]));
  points.sort((a, b) => a[0] - b[0]);
  const most = points.reduce((high, point) => Math.max(high, point[1]), 1);
  let d = `M${x(0)} ${to}`;
  for (const [at, live] of points) d += `H${x(at)}V${(to - 28 * live / most).toFixed(1)}`;
  draw(svg, "path", { class: "live", d: `${d}H${x(data.end)}V${to}Z` }, () => [`at most ${count(most, "live node")}`]);
}

function arrivalLane(svg, from, to) {
  const most = data.arrivals.reduce((high, arrival) => Math.max(high, arrival[1]), 1);
  for (const [at, nodes, added, stale, late, size, sent] of data.arrivals) {
    const tall = 28 * nodes / most, gone = 28 * stale / most;
    const group = draw(svg, "g", {}, () => [
      `${count(nodes, "node")} arrived`,
      `at ${ms(at)}: ${added} live, ${stale} ruled out meanwhile, ${late} late`,
      bytes(size) + (sent === null ? "" : `, ${ms(at - sent)} on the way`),
    ]);
    if (tall > gone) draw(group, "path", { class: "arrival", d: `M${x(at)} ${to}v${gone - tall}` });
    if (gone) draw(group, "path", { class: "arrival stale", d: `M${x(at)} ${to - tall + gone}v${-gone}` });
  }
}

function wires(svg, from, to) {
  let down = "", up = "";
  for (const [at, , , , , , sent] of data.arrivals) {
    if (sent !== null) down += `M${x(sent)} ${to + 4}L${x(at)} ${from - 6}`;
  }
  for (const step of steps) {
    if (step.received !== null) up += `M${x(step.end)} ${from - 6}L${x(step.received)} ${to + 4}`;
  }
  draw(svg, "path", { class: "down", d: down });
  draw(svg, "path", { class: "up", d: up });
}

function drafterLanes(lane) {
  for (const name of new Set(data.sessions.map((session) => session.drafter))) {
    const sessions = data.sessions.filter((session) => session.drafter === name);
    lane("commits in", 10, (svg, from) => sessions.forEach((session) => receipts(svg, from, session)));
    const branches = sessions.flatMap((session) => session.branches.map((branch) => [session, branch]));
    const lanes = branches.reduce((most, [, branch]) => Math.max(most, branch.lane), 0);
    lane(`${name}: branches`, 14 + lanes * 7, (svg, from) => {
      for (const [session, branch] of branches) branchBar(svg, from, session, branch);
    });
  }
}

function receipts(svg, from, session) {
  for (const [at, position, tokens, opening] of session.commits) {
    const what = opening ? "piece of the context" : "commit";
    draw(svg, "path", { class: "receipt", d: `M${x(at)} ${from}v10` },
      () => [`${what} received at ${ms(at)}`, `${count(tokens, "token")} from position ${position}`]);
  }
  for (const [at, code] of session.rejects) {
    draw(svg, "text", { class: "reject", x: x(at), y: from + 9, text: `✕ ${code}` });
  }
}

function branchBar(svg, from, session, branch) {
  const until = branch.end ?? session.end;
  const ended = branch.end === null ? "the end of the log" : `${ms(branch.end)} (${branch.ending})`;
  const y = from + (branch.lane ? 7 + branch.lane * 7 : 0), height = branch.lane ? 5 : 10;
  const tip = () => [
    `${branch.main ? "main line" : "branch"} (${branch.number})`,
    `extends node ${branch.node}, gave ${count(branch.tokens, "token")}`,
    `from ${ms(branch.start)} to ${ended}`,
    branch.promoted === null ? "" : `became the main line at ${ms(branch.promoted)}`,
  ];
  const bar = (start, name) => {
    const width = Math.max(1.5, x(until) - x(start) - 1);
    draw(svg, "rect", { class: `branch-run ${name}`, x: x(start), y, width, height, rx: 2 }, tip);
  };
  bar(branch.start, branch.main ? "main" : "side");
  if (branch.promoted !== null) bar(branch.promoted, "promoted");
}

function stepTip(step, index) {
  const asked = step.limit ? ` (${step.drafted.length} of at most ${step.limit})` : "";
  return [
    index ? `step ${index}` : "prefill",
    `${ms(step.start)} to ${ms(step.end)} (${ms(step.end - step.start)}), position ${step.position}`,
    `had ${SAID[step.had]}${index ? asked : ""}`,
    step.waited ? `held back for ${ms(step.waited)}` : "",
    step.drafted.length ? `drafts: ${step.drafted.map(named).join("  ")}` : "",
    `committed: ${step.tokens.map(named).join("  ")}`,
    `${count(step.accepted, "draft")} accepted; ${SAID[step.outcome]}`,
    step.received === null ? "" : `the drafter had it ${ms(step.received - step.end)} later`,
  ];
}
