// Words about a node: the box beside the mouse, and the panel at the right.

const whole = d3.format(",");
const bytes = (n) => (n >= 1e6 ? `${(n / 1e6).toFixed(2)} MB` : n >= 1e4 ? `${(n / 1e3).toFixed(1)} kB` : `${n} B`);
const micro = (ns) => `${(ns / 1e3).toFixed(2)} µs`;
const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const row = (name, value) => (value === "" ? "" : `<tr><td>${name}</td><td>${value}</td></tr>`);

function fieldText(i) {
  return kind(i).fields.map((name, j) => `${name} ${word(i, "PAYLOAD", j)}`).join(", ");
}

function title(i) {
  return `${kind(i).name}, layer ${word(i, "LAYER")}, sm ${records.sm[i]} #${records.index[i]}`;
}

function waitText({ counter, target, lag }) {
  const from = escaped(counters[counter].from);
  return `c${counter} ≥ ${target} × ${lag ? "tokens before" : "tokens"}: ${from}${lag ? " of the token before" : ""}`;
}

function regionText(numbers) {
  return numbers.map((number) => escaped(data.strings[number])).join("<br>");
}

function wordText(i) {
  const name = (at) => data.wordNames[at] ?? kind(i).fields[at - data.word.PAYLOAD];
  const shown = records.words[i].map((value, at) => (name(at) === undefined ? null : `${name(at)} <b>${value}</b>`));
  return shown.filter(Boolean).join(" · ");
}

function describe(i) {
  const ns = records.ns[i];
  const pages = word(i, "PAGES") ? `${word(i, "PAGES")}, from page ${whole(word(i, "TAPE"))}; use ${word(i, "PAGE")} on` : "";
  const awaited = loadWait(i);
  const cost = `${micro(d3.sum(ns))} = ${micro(ns[0])} before, ${micro(ns[1])} streaming, ${micro(ns[2])} storing`;
  return (
    `<h2 class="chip" style="--colour:${kind(i).colour}">${title(i)}</h2><table>` +
    row("fields", fieldText(i)) +
    row("waits", waits(i).map(waitText).join("<br>")) +
    row("loader waits", awaited ? waitText(awaited) : "") +
    row("signals", signals(i).map((c) => `c${c}: ${escaped(counters[c].to)}`).join("<br>")) +
    row("reads", regionText(records.reads[i])) +
    row("writes", regionText(records.writes[i])) +
    row("pages", pages) +
    row("bytes", `${bytes(records.bytes[i])} from HBM, ${whole(records.flops[i])} flops`) +
    row("cost", cost) +
    row("", onPath.has(i) ? '<b class="hot">on the critical path</b>' : "") +
    `</table><div class="words">${wordText(i)}</div>`
  );
}

function describeCounter(c) {
  const hot = onPath.has(counterNode(c)) ? '<b class="hot">on the critical path</b>' : "";
  return (
    `<h2>counter ${c}</h2><table>` +
    row("signals", `${counters[c].target} a token`) +
    row("from", escaped(counters[c].from)) +
    row("awaited by", escaped(counters[c].to)) +
    row("", hot) +
    "</table>"
  );
}

function describeGroup(g) {
  const members = d3.range(count).filter((i) => records.place[i][0] === g);
  const bands = groups[g].bands.map(([name, , , number]) => row(name, `${whole(number)} instructions`)).join("");
  const hops = members.filter((i) => onPath.has(i)).length;
  return (
    `<h2>${escaped(groups[g].name)}</h2><table>${bands}` +
    row("bytes", `${bytes(d3.sum(members, (i) => records.bytes[i]))} from HBM`) +
    row("critical path", `${hops} instructions`) +
    "</table><p>Click to fold or unfold.</p>"
  );
}

const describeNode = (node) => (node >= 0 ? describe(node) : describeCounter(-1 - node));

function showHover(html, x, y) {
  const box = document.getElementById("hover");
  box.hidden = html === null;
  if (html === null) return;
  box.innerHTML = html;
  const { offsetWidth: width, offsetHeight: height } = box;
  box.style.left = `${Math.max(4, Math.min(x + 16, innerWidth - width - 8))}px`;
  box.style.top = `${Math.max(4, y + 16 + height > innerHeight ? y - height - 12 : y + 16)}px`;
}

// The critical path in words: how often each kind stands on it.
function pathSummary() {
  const kinds = d3.rollup(data.path.filter((node) => node >= 0), (nodes) => nodes.length, (i) => kind(i).name);
  const rows = [...kinds].map(([name, number]) => row(name, number)).join("");
  return (
    `<h3 class="hot">Critical path</h3><p>${micro(data.pathSeconds * 1e9)} over ${data.pathHops} instructions: ` +
    "the longest chain of waits and queues, if every page were there already. No HBM could make the step shorter." +
    `</p><table>${rows}</table><h3>How to use it</h3><p>Wheel: zoom. Drag: move. Click on a layer: fold or unfold. ` +
    "Hover: what is it? Click on an instruction: its SM's queue, what it waits for (orange) and who waits for it " +
    "(green; dashed: across tokens). Escape: let go.</p>"
  );
}

function showDetails() {
  const panel = d3.select("#details").html(state.node === null && state.sm === null ? pathSummary() : "");
  if (state.node !== null) panel.append("div").html(describeNode(state.node));
  if (state.sm === null) return;
  const queue = queues[state.sm];
  panel.append("h3").text(`Queue of SM ${state.sm}: ${queue.length} instructions, ${bytes(d3.sum(queue, (i) => records.bytes[i]))}`);
  panel
    .append("ol")
    .selectAll("li")
    .data(queue)
    .join("li")
    .attr("class", (i) => (i === state.node ? "chip here" : "chip"))
    .style("--colour", (i) => kind(i).colour)
    .text((i) => `#${records.index[i]} ${kind(i).name} ${word(i, "LAYER")} · ${bytes(records.bytes[i])} · ${micro(d3.sum(records.ns[i]))}`)
    .on("click", (_, i) => goTo(i));
  panel.select("li.here").each(function () {
    this.scrollIntoView({ block: "nearest" });
  });
}
