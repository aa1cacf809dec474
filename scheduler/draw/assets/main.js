// What the user does: zoom, hover, click, fold, find.

const zoom = d3
  .zoom()
  .scaleExtent([0.02, 8])
  .filter((event) => !event.button)
  .on("zoom", (event) => {
    state.transform = event.transform;
    showHover(null);
    redraw();
  });
const picture = d3.select(canvas).call(zoom).on("dblclick.zoom", null);

function moveTo(k, x, y) {
  picture.call(zoom.transform, d3.zoomIdentity.translate(x, y).scale(k));
}

// The whole width, from the top.
function fit() {
  const k = Math.min((canvas.clientWidth - LABELS - 30) / data.width, 1.6);
  moveTo(k, LABELS + 15, 16);
}

function setFolded(folded) {
  state.folded = new Set(folded);
  arrange();
  redraw();
}

// Fold or unfold one group; what stands above the mouse stays where it is.
function toggle(g) {
  const folded = new Set(state.folded);
  if (!folded.delete(g)) folded.add(g);
  setFolded(folded);
}

function choose(node, sm) {
  state.node = node;
  state.sm = sm;
  showDetails();
  redraw();
}

// Choose a node and bring it to the middle.
function goTo(node) {
  const at = place(node);
  if (!at) return;
  if (state.folded.has(at[0])) toggle(at[0]);
  choose(node, node >= 0 ? records.sm[node] : null);
  const [x, y] = position(node);
  const k = Math.max(state.transform.k, 0.6);
  const middle = LABELS + (canvas.clientWidth - LABELS) / 2;
  moveTo(k, middle - x * k, canvas.clientHeight / 2 - y * k);
}

// "sm 5", "sm 5 #12", "c40", "down 3" (the first of layer 3).
function find(query) {
  const numbers = (query.match(/\d+/g) ?? []).map(Number);
  const name = query.trim().toLowerCase().split(/[\s#]+/)[0].replace(/\d+$/, "");
  if (name === "sm" && queues[numbers[0]]) {
    const i = queues[numbers[0]].find((j) => records.index[j] === numbers[1]);
    if (i !== undefined) goTo(i);
    else choose(null, numbers[0]);
    return true;
  }
  if (name === "c" && counters[numbers[0]]?.place) {
    goTo(counterNode(numbers[0]));
    return true;
  }
  const i = d3.range(count).find((j) => kind(j).name === name && (numbers.length === 0 || word(j, "LAYER") === numbers[0]));
  if (i !== undefined) goTo(i);
  return i !== undefined;
}

canvas.addEventListener("mousemove", (event) => {
  const { offsetX: x, offsetY: y } = event;
  const node = nodeAt(x, y);
  const g = groupAt(y);
  const folded = node === null && g !== null && (state.folded.has(g) || x < LABELS);
  canvas.classList.toggle("over", node !== null || folded);
  if (event.buttons) return;
  showHover(node !== null ? describeNode(node) : folded ? describeGroup(g) : null, event.clientX, event.clientY);
});
canvas.addEventListener("mouseleave", () => showHover(null));
canvas.addEventListener("click", (event) => {
  const { offsetX: x, offsetY: y } = event;
  const node = nodeAt(x, y);
  const g = groupAt(y);
  if (x >= LABELS && node !== null) choose(node, node >= 0 ? records.sm[node] : null);
  else if (g !== null && (state.folded.has(g) || x < LABELS)) toggle(g);
  else choose(null, null);
  showHover(null);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") choose(null, null);
});
window.addEventListener("resize", redraw);
d3.select("#unfold").on("click", () => setFolded([]));
d3.select("#fold").on("click", () => setFolded(d3.range(groups.length)));
d3.select("#fit").on("click", fit);
d3.select("#critical").on("change", (event) => {
  state.critical = event.target.checked;
  redraw();
});
d3.select("#find").on("submit", (event) => {
  event.preventDefault();
  const input = document.getElementById("query");
  input.setCustomValidity(find(input.value) ? "" : "nothing of that name is drawn here");
  input.reportValidity();
});
d3.select("#query").on("input", (event) => event.target.setCustomValidity(""));

d3.select("#facts").text(Object.entries(data.facts).map(([name, value]) => `${name} ${typeof value === "number" ? whole(value) : value}`).join(" · "));
const drawn = new Set(d3.range(count).map((i) => word(i, "OPCODE")));
d3.select("#legend")
  .selectAll("span")
  .data(Object.entries(data.kinds).filter(([opcode]) => drawn.has(+opcode)))
  .join("span")
  .style("--colour", ([, { colour }]) => colour)
  .text(([, { name }]) => name);

// A whole model opens with its first layer unfolded, so that both can be seen: the layer and that there are more.
setFolded(groups.length > 3 ? d3.range(2, groups.length) : []);
showDetails();
fit();
draw();

// For the browser's console, and for tests: where a node is on the screen.
window.schedule = {
  state,
  find,
  screen: (node) => {
    const at = position(node);
    const { left, top } = canvas.getBoundingClientRect();
    const [x, y] = state.transform.apply(at);
    return [left + x, top + y];
  },
  groupBar: (g) => [LABELS / 2, state.transform.applyY(view.tops[g]) + Math.min(groupHeight(g) * state.transform.k, 24) / 2],
};
