// What the user does, and what becomes of it.
let model = "", busy = null; // the AbortController of the answer under way

async function say(text, from = store.turns.length) {
  if (busy) return;
  store.turns.splice(from);
  store.turns.push({ role: "user", content: text });
  await generate();
}

function regenerate(number) {
  if (busy) return;
  store.turns.splice(number);
  generate();
}

async function generate() {
  const turn = { role: "assistant", content: "" };
  const controller = busy = new AbortController(), began = performance.now();
  let body = null, first = null, usage = null;
  show();
  try {
    model ||= await modelName();
    body = requestBody(model);
    store.turns.push(turn);
    draw();
    grow(turn);
    for await (const event of answer(body, controller.signal)) {
      const piece = event.choices[0]?.delta.content;
      if (piece) {
        first ??= performance.now();
        turn.content += piece;
        grow(turn);
      }
      usage = event.usage ?? usage;
    }
    turn.note = noteOf(began, first, performance.now(), usage);
  } catch (error) {
    if (error.name === "AbortError") turn.note = "stopped";
    else failed(turn, error);
  }
  busy = null;
  store.save();
  show();
  draw();
  $("input").focus();
  check();
}

function failed(turn, error) {
  if (!store.turns.includes(turn)) store.turns.push(turn);
  if (turn.content) { turn.note = error.message; return; }
  turn.error = true;
  turn.content = error.message;
  model = "";
}

function noteOf(began, first, ended, usage) {
  const parts = [];
  if (usage) parts.push(`${usage.completion_tokens} tokens`);
  if (usage && first !== null && usage.completion_tokens > 1) {
    parts.push(`${((usage.completion_tokens - 1) / (ended - first) * 1000).toFixed(1)} tokens/s`);
  }
  if (first !== null) parts.push(`first after ${(first - began).toFixed(0)} ms`);
  const kept = usage?.prompt_tokens_details?.cached_tokens;
  if (kept) parts.push(`${kept} of ${usage.prompt_tokens} prompt tokens kept`);
  return parts.join(", ");
}

function show() {
  $("stop").hidden = !busy;
  $("send").hidden = Boolean(busy);
}

async function check() {
  let state = "not reachable";
  try {
    const told = await (await fetch("health")).json();
    state = told.state === "ok" ? (told.waiting ? `${told.waiting} waiting` : "ready") : told.state;
    $("model").textContent = document.title = told.model;
  } catch { /* it says so */ }
  $("health").textContent = state;
  $("health").className = state === "ready" || state.endsWith("waiting") ? "good" : "bad";
}

function fresh() {
  busy?.abort();
  store.turns.splice(0);
  store.save();
  draw();
  $("input").focus();
}

function openSettings() {
  for (const name of [...NUMBERS, "system", "stop_at"]) $(name).value = store.settings[name] ?? "";
  $("key").value = store.key;
  $("settings").showModal();
}

function closeSettings() {
  for (const name of [...NUMBERS, "system", "stop_at"]) store.settings[name] = $(name).value;
  store.key = $("key").value;
  store.save();
  check();
}

function fit() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight + 2}px`;
}

$("composer").onsubmit = event => {
  event.preventDefault();
  const text = $("input").value;
  if (!text.trim() || busy) return;
  $("input").value = "";
  fit();
  say(text);
};
$("input").oninput = fit;
$("input").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("composer").requestSubmit(); }
};
$("stop").onclick = () => busy?.abort();
$("new").onclick = fresh;
$("open-settings").onclick = openSettings;
$("settings").onclose = closeSettings;
document.onkeydown = event => {
  if (event.key === "Escape" && busy && !$("settings").open) busy.abort();
  if (event.altKey && event.code === "KeyN") { event.preventDefault(); fresh(); }
  if (event.altKey && event.code === "KeyS") { event.preventDefault(); openSettings(); }
};
setInterval(check, 15000);
draw();
check();
