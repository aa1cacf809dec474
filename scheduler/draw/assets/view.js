// The picture: which groups are folded, where that leaves every node, and the drawing of it all on the canvas.

const FOLDED = 54, BETWEEN = 16, LABELS = 128, CELL = 16;
const canvas = document.getElementById("picture");
const pen = canvas.getContext("2d");
const state = { folded: new Set(), transform: d3.zoomIdentity, sm: null, node: null, critical: true };
const view = { tops: [], height: 0, edges: new Path2D(), tree: d3.quadtree() };

const cellWidth = data.pitch - 4;
const place = (node) => (node >= 0 ? records.place[node] : counters[-1 - node].place);
const groupHeight = (g) => (state.folded.has(g) ? FOLDED : groups[g].height);

// Centre of a node in the picture; of its group's bar where that is folded; null where it is not drawn.
function position(node) {
  const at = place(node);
  if (!at) return null;
  const [g, x, y] = at;
  return state.folded.has(g) ? [data.width / 2, view.tops[g] + FOLDED / 2] : [x, view.tops[g] + y];
}

// Where an edge leaves or enters a node: below (+1) or above (-1) its centre.
function port(node, side) {
  const at = position(node);
  if (!at) return null;
  const half = state.folded.has(place(node)[0]) ? FOLDED / 2 : node >= 0 ? CELL / 2 : 0;
  return [at[0], at[1] + side * half];
}

function arrange() {
  let y = 0;
  view.tops = groups.map((_, g) => {
    const top = y;
    y += groupHeight(g) + BETWEEN;
    return top;
  });
  view.height = y;
  view.edges = new Path2D();
  const seen = new Set();
  for (const [a, b] of edges) {
    if (!place(a) || !place(b)) continue;
    const inside = place(a)[0] === place(b)[0];
    if (inside && state.folded.has(place(a)[0])) continue;
    const [p, q] = [port(a, 1), port(b, -1)];
    const key = `${p},${q}`;
    if (seen.has(key)) continue;
    seen.add(key);
    view.edges.moveTo(...p);
    view.edges.lineTo(...q);
  }
  const nodes = [...d3.range(count), ...d3.range(counters.length).map(counterNode)];
  const unfolded = nodes.filter((node) => place(node) && !state.folded.has(place(node)[0]));
  view.tree = d3.quadtree(unfolded, (node) => position(node)[0], (node) => position(node)[1]);
}

function trace(points) {
  pen.beginPath();
  points.forEach((point, k) => (k ? pen.lineTo(...point) : pen.moveTo(...point)));
  pen.stroke();
}

function diamond([x, y], size) {
  pen.beginPath();
  pen.moveTo(x, y - size);
  pen.lineTo(x + size, y);
  pen.lineTo(x, y + size);
  pen.lineTo(x - size, y);
  pen.closePath();
}

function drawGroups() {
  groups.forEach((group, g) => {
    pen.fillStyle = state.folded.has(g) ? "#eaeef2" : "#f6f8fa";
    pen.strokeStyle = "#d0d7de";
    pen.lineWidth = 1 / state.transform.k;
    pen.beginPath();
    pen.roundRect(-10, view.tops[g], data.width + 20, groupHeight(g), 8);
    pen.fill();
    pen.stroke();
    if (!state.folded.has(g)) return;
    const total = d3.sum(group.bands, (band) => band[3]);
    let x = 30;
    for (const [name, , , members] of group.bands) {
      const width = Math.max(3, ((data.width - 60) * members) / total - 4);
      pen.fillStyle = colours.get(name);
      pen.fillRect(x, view.tops[g] + FOLDED / 2 - 7, width, 14);
      x += width + 4;
    }
  });
}

function drawCells(top, bottom) {
  const half = CELL / 2;
  for (const [opcode, { colour }] of Object.entries(data.kinds)) {
    pen.fillStyle = colour;
    for (const i of byKind.get(+opcode) ?? []) {
      const [g, x, y] = records.place[i];
      const at = view.tops[g] + y;
      if (state.folded.has(g) || at < top - CELL || at > bottom + CELL) continue;
      pen.fillRect(x - cellWidth / 2, at - half, cellWidth, CELL);
    }
  }
  pen.fillStyle = "#57606a";
  counters.forEach((counter, c) => {
    if (!counter.place || state.folded.has(counter.place[0])) return;
    diamond(position(counterNode(c)), 6);
    pen.fill();
  });
}

function outline(i, colour, width) {
  const at = place(i);
  if (!at || state.folded.has(at[0])) return;
  const [x, y] = position(i);
  pen.strokeStyle = colour;
  pen.lineWidth = Math.min(width / Math.min(state.transform.k, 1), 5);
  if (i >= 0) pen.strokeRect(x - cellWidth / 2 - 1, y - CELL / 2 - 1, cellWidth + 2, CELL + 2);
  else {
    diamond([x, y], 8);
    pen.stroke();
  }
}

function drawQueue() {
  if (state.sm === null) return;
  pen.fillStyle = "rgb(9 105 218 / 13%)";
  pen.fillRect(state.sm * data.pitch, -10, data.pitch, view.height + 10);
  for (const i of queues[state.sm]) outline(i, "#0969da", 1.6);
}

function drawCritical() {
  if (!state.critical) return;
  pen.strokeStyle = "#cf222e";
  pen.lineWidth = 2.2 / state.transform.k;
  trace(data.path.map(position).filter(Boolean));
  for (const node of data.path) outline(node, "#cf222e", 1.6);
}

// The chosen node, with what it waits for (orange; dashed from the previous token) and what waits for it (green).
function drawChosen() {
  if (state.node === null || !position(state.node)) return;
  const counter = state.node < 0 ? -1 - state.node : null;
  const before = counter === null ? [...waits(state.node), loadWait(state.node)].filter(Boolean) : [{ counter, lag: 0 }];
  const after = counter === null ? signals(state.node) : [counter];
  for (const { counter: c, lag } of before) {
    const lines = producers[c].map((i) => [i, counterNode(c)]);
    if (counter === null) lines.push([counterNode(c), state.node]);
    drawLines(lines, "#d4730b", lag);
  }
  for (const c of after) {
    if (counter === null) drawLines([[state.node, counterNode(c)]], "#1a7f37", 0);
    for (const { i, lag } of readers[c]) drawLines([[counterNode(c), i]], "#1a7f37", lag);
  }
  outline(state.node, "#000", 2.4);
}

function drawLines(pairs, colour, lag) {
  const { k } = state.transform;
  pen.strokeStyle = colour;
  pen.lineWidth = 1.2 / k;
  pen.setLineDash(lag ? [6 / k, 4 / k] : []);
  for (const [a, b] of pairs) {
    const ends = [port(a, 1), port(b, -1)];
    if (ends[0] && ends[1]) trace(ends);
  }
  pen.setLineDash([]);
}

// Names of groups and bands stay at the left edge, at their height.
function drawLabels(height) {
  const { k, y } = state.transform;
  pen.fillStyle = "rgb(255 255 255 / 88%)";
  pen.fillRect(0, 0, LABELS, height);
  pen.textBaseline = "middle";
  groups.forEach((group, g) => {
    const folded = state.folded.has(g);
    const top = y + view.tops[g] * k, bottom = top + groupHeight(g) * k;
    if (bottom < 0 || top > height) return;
    pen.fillStyle = "#1f2328";
    pen.font = "600 13px sans-serif";
    const middle = folded ? (top + bottom) / 2 : Math.min(Math.max(top + 12, 10), bottom - 8);
    if (bottom - top > 11 || folded) pen.fillText(`${folded ? "▸" : "▾"} ${group.name}`, 8, middle, LABELS - 12);
    if (folded || (bottom - top) / group.bands.length < 30) return;
    pen.font = "12px sans-serif";
    pen.fillStyle = "#57606a";
    for (const [name, at, tall, members] of group.bands) {
      const height = Math.max(y + (view.tops[g] + at + tall / 2) * k, top + 28);
      if (Math.abs(height - middle) > 14) pen.fillText(`${name} × ${members}`, 22, height, LABELS - 26);
    }
  });
}

function draw() {
  const scale = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  if (canvas.width !== width * scale || canvas.height !== height * scale) {
    canvas.width = width * scale;
    canvas.height = height * scale;
  }
  const { k, x, y } = state.transform;
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.setTransform(scale * k, 0, 0, scale * k, scale * x, scale * y);
  drawGroups();
  pen.strokeStyle = `rgb(110 119 129 / ${Math.min(0.3, Math.max(0.08, k * 0.7))})`; // far away they would hide the rest
  pen.lineWidth = 0.7 / k;
  pen.stroke(view.edges);
  drawCells(-y / k, (height - y) / k);
  drawQueue();
  drawCritical();
  drawChosen();
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  drawLabels(height);
}

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw();
  });
}

const byKind = d3.group(d3.range(count), (i) => word(i, "OPCODE"));
const colours = new Map(Object.values(data.kinds).map(({ name, colour }) => [name, colour]));

// The group at a height of the picture, or null; and the node at a point of the screen, or null.
function groupAt(screenY) {
  const y = state.transform.invertY(screenY);
  const g = view.tops.findIndex((top, g) => y >= top && y <= top + groupHeight(g));
  return g < 0 ? null : g;
}

function nodeAt(screenX, screenY) {
  const [x, y] = state.transform.invert([screenX, screenY]);
  const slack = 2 / state.transform.k;
  const [farX, farY] = [data.pitch / 2 + slack, CELL / 2 + slack]; // no node reaches farther from its centre
  let found = null;
  view.tree.visit((quad, left, top, right, bottom) => {
    for (let leaf = quad.length ? null : quad; leaf; leaf = leaf.next) {
      const [atX, atY] = position(leaf.data);
      const [wide, tall] = leaf.data >= 0 ? [cellWidth / 2, CELL / 2] : [8, 8];
      if (Math.abs(x - atX) <= wide + slack && Math.abs(y - atY) <= tall + slack) found = leaf.data;
    }
    return found !== null || x < left - farX || x > right + farX || y < top - farY || y > bottom + farY;
  });
  return found;
}
