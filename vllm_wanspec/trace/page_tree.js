// --- tree: columns are positions, row 0 is what was committed --------------------------------------------------------
const HEAD = 58, TREE_LEFT = 20;
const columns = tree.column.reduce((most, column) => Math.max(most, column), 1);
const places = new Map(tree.column.map((column, place) => [`${column},${tree.row[place]}`, place]));
const hidden = new Set();
let pitch, gap;
const treeX = (column) => TREE_LEFT + column * pitch;
const treeY = (row) => HEAD + (row ? 8 + row * gap : 0);

function drawTree() {
  const svg = $("tree"), zoom = 2 ** Number($("tree-zoom").value);
  const fit = Math.max(15, Math.min(36, ($("tree-scroll").clientWidth - 70) / columns));
  pitch = fit * zoom;
  gap = Math.min(10, fit * 0.4) * zoom;
  svg.replaceChildren();
  const rows = offPath(svg);
  path(svg);
  draw(svg, "g", { id: "marks" });
  svg.setAttribute("width", treeX(columns) + 40);
  svg.setAttribute("height", treeY(rows) + 16);
  select(selected);
}

// One path of edges and one of dots for each fate: tens of thousands of elements would be slow.
function offPath(svg) {
  const edges = {}, dots = {};
  let rows = 1;
  tree.column.forEach((column, place) => {
    const fate = fateOf(place), row = tree.row[place], above = tree.above[place];
    if (!row || hidden.has(fate)) return;
    rows = Math.max(rows, row);
    const right = treeX(column).toFixed(1), low = treeY(row).toFixed(1);
    const left = treeX(above < 0 ? 0 : tree.column[above]), high = treeY(above < 0 ? 0 : tree.row[above]);
    const bend = (left + Math.min(pitch / 2, low - high)).toFixed(1), middle = ((high + Number(low)) / 2).toFixed(1);
    const curve = low - high < 0.1 ? `H${right}` : `Q${bend} ${high.toFixed(1)} ${bend} ${middle}T${right} ${low}`;
    (edges[fate] ??= []).push(`M${left.toFixed(1)} ${high.toFixed(1)}${curve}`);
    (dots[fate] ??= []).push(`M${right} ${low}h0`);
  });
  for (const fate in edges) {
    const name = fate === "rejected" ? "edge" : "edge faint";
    draw(svg, "path", { class: name, d: edges[fate].join(""), style: color(fate) });
  }
  for (const fate in dots) {
    const style = `${color(fate)}; stroke-width: ${gap * 0.62}`;
    draw(svg, "path", { class: "dots", "data-fate": fate, d: dots[fate].join(""), style });
  }
  return rows;
}

function path(svg) {
  const off = tree.row.findIndex((row) => row > 0), onPath = off < 0 ? tree.row.length : off;
  draw(svg, "path", { class: "edge path", d: `M${treeX(0)} ${HEAD}H${treeX(onPath)}` });
  draw(svg, "circle", { cx: treeX(0), cy: HEAD, r: 5 });
  for (let place = 0; place < onPath; place++) {
    const fate = fateOf(place), at = treeX(tree.column[place]), r = Math.min(4.6, pitch / 3);
    draw(svg, "circle", { class: `node ${fate}`, cx: at, cy: HEAD, r, style: color(fate), "data-node": place });
    if (pitch < 9) continue;
    const turn = `translate(${at + 3} ${HEAD - 9}) rotate(-62)`;
    draw(svg, "text", { class: "label", transform: turn, text: shortened(text(tree.token[place]), 9) });
  }
}

function nodeTip(place) {
  const fate = fateOf(place), step = tree.step[place];
  const lines = [named(tree.token[place]), `position ${data.context + tree.column[place] - 1}, ${FATES[fate]}`];
  if (tree.id[place] !== null) {
    const logprob = tree.logprob[place], entropy = number(tree.entropy[place], 2);
    if (fate !== "echo") {
      lines.push(`probability ${number(Math.exp(logprob), 3)} (log ${number(logprob, 3)}), entropy ${entropy} nats`);
    }
    const came = fate === "echo" ? "made by both sides, here at" : "arrived at";
    lines.push(`node ${tree.id[place]}, ${came} ${ms(tree.arrived[place])}`);
  }
  if (step !== null && steps[step]) {
    const how = tree.row[place] ? "settled" : "committed";
    lines.push(`${how} at ${ms(steps[step].end)} by ${step ? `step ${step}` : "the prefill"}`);
  }
  return lines;
}

function nodeAt(event) {
  const box = $("tree").getBoundingClientRect(), y = event.clientY - box.top;
  const column = Math.round((event.clientX - box.left - TREE_LEFT) / pitch);
  const row = y < HEAD + 4 ? 0 : Math.max(0, Math.round((y - HEAD - 8) / gap));
  const place = places.get(`${column},${row}`);
  return row && place !== undefined && hidden.has(fateOf(place)) ? undefined : place;
}

function treeLegend() {
  const shown = data.names.filter((name) => tree.fate.includes(data.names.indexOf(name)));
  const style = (name) => name === "echo" || name === "undrafted" ? "round hollow" : "round";
  const entries = legend("tree-legend", shown.map((name) => [name, FATES[name], style(name)]));
  entries.forEach((entry, index) => {
    if (!WASTE.includes(shown[index])) return;
    entry.className = "switch";
    entry.tip = () => ["click to show or hide these"];
    entry.addEventListener("click", () => {
      if (!hidden.delete(shown[index])) hidden.add(shown[index]);
      entry.classList.toggle("off");
      drawTree();
    });
  });
}
