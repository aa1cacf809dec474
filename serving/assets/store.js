// What the page remembers from one visit to the next: the conversation and the settings.  The key is kept for this tab alone.
const NUMBERS = ["temperature", "top_p", "top_k", "seed", "max_tokens"];

const store = {
  turns: recall("turns", []), // {role, content, note?, error?}
  settings: recall("settings", {}),
  get key() { return sessionStorage.getItem("megakernel.key") || ""; },
  set key(value) { sessionStorage.setItem("megakernel.key", value); },
  save() {
    keep("turns", this.turns);
    keep("settings", this.settings);
  },
};

function recall(name, otherwise) {
  try { return JSON.parse(localStorage.getItem("megakernel." + name)) ?? otherwise; } catch { return otherwise; }
}

function keep(name, value) {
  try { localStorage.setItem("megakernel." + name, JSON.stringify(value)); } catch { /* it is full, or not to be had */ }
}

// The body of a request for the next turn.
function requestBody(model) {
  const asked = { model, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) {
    if (store.settings[name] !== undefined && store.settings[name] !== "") asked[name] = Number(store.settings[name]);
  }
  if (store.settings.stop_at) asked.stop = [store.settings.stop_at];
  const said = store.turns.filter(turn => !turn.error).map(({ role, content }) => ({ role, content }));
  asked.messages = store.settings.system ? [{ role: "system", content: store.settings.system }, ...said] : said;
  return asked;
}
