// --- pointing: tooltips, the selected step, and keys -----------------------------------------------------------------
let selected = null, kept = false;

function select(index) {
  if (selected !== null && reaches[selected]) reaches[selected].classList.remove("on");
  selected = index;
  const marks = $("marks");
  if (marks) marks.replaceChildren();
  if (index === null || !reaches[index] || !marks) return;
  reaches[index].classList.add("on");
  const step = steps[index], left = treeX(step.position - data.context + 0.5);
  const height = $("tree").getAttribute("height");
  draw(marks, "rect", { class: "mark", x: left, y: 0, width: step.tokens.length * pitch, height });
  for (const place of step.draft) {
    const row = tree.row[place];
    draw(marks, "circle", { class: "ring", cx: treeX(tree.column[place]), cy: treeY(row), r: row ? gap * 0.75 : 7 });
  }
}

function show(lines, left, top) {
  const tip = $("tip");
  tip.replaceChildren();
  put(tip, "b", "", lines[0]);
  tip.append(lines.slice(1).filter(Boolean).join("\n"));
  tip.hidden = false;
  const under = top + 18, fits = under + tip.offsetHeight <= innerHeight;
  tip.style.left = `${Math.max(8, Math.min(left + 14, innerWidth - tip.offsetWidth - 12))}px`;
  tip.style.top = `${fits ? under : Math.max(8, top - tip.offsetHeight - 12)}px`;
}

function reveal(index) {
  const time = $("time-scroll"), tall = $("tree-scroll");
  time.scrollTo({ left: reaches[index].getBBox().x - time.clientWidth / 2 });
  tall.scrollTo({ left: treeX(steps[index].position - data.context) - tall.clientWidth / 2 });
}

function point(event) {
  let target = event.target;
  const inTree = $("tree").contains(target), place = inTree ? nodeAt(event) : undefined;
  while (!inTree && target && !target.tip) target = target.parentElement;
  const step = inTree ? tree.step[place] : target?.step;
  if (!kept && step !== undefined) select(step);
  if (place !== undefined) show(nodeTip(place), event.clientX, event.clientY);
  else if (!inTree && target) show(target.tip(), event.clientX, event.clientY);
  else $("tip").hidden = true;
}

function keep(event) {
  const place = $("tree").contains(event.target) ? nodeAt(event) : undefined;
  const step = event.target.step ?? (place === undefined ? null : tree.step[place]);
  if (step === null || !reaches[step]) return;
  kept = true;
  select(step);
  reveal(step);
}

function walk(event) {
  if (event.target.tagName === "INPUT") return;
  if (event.key === "Escape") {
    kept = false;
    select(null);
    $("tip").hidden = true;
  }
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!move || !steps.length) return;
  event.preventDefault();
  kept = true;
  select(Math.max(0, Math.min(steps.length - 1, (selected ?? -1) + move)));
  reveal(selected);
  const box = reaches[selected].getBoundingClientRect();
  show(stepTip(steps[selected], selected), box.left, box.bottom);
}

header();
legend("time-legend", [
  ["accepted", "accepted draft"], ["accepted", "rejected draft", "hollow"], ["caught", "drafts of a branch"],
  ["undrafted", "no draft", "hollow"], ["caught", "caught by a branch", "", "◆"], ["rejected", "miss", "", "✕"],
  ["late", "past the end", "", "»"], ["arrival", "nodes arriving"], ["stale", "too late"], ["wait", "wait"],
]);
treeLegend();
timeline();
drawTree();
uses();
$("time-zoom").addEventListener("input", timeline);
$("tree-zoom").addEventListener("input", drawTree);
document.addEventListener("mousemove", point);
document.addEventListener("click", keep);
document.addEventListener("keydown", walk);
document.body.dataset.ready = `${steps.length} steps, ${tree.column.length} nodes`;
