// Draws the conversation.  What a model says is only ever text.
const $ = id => document.getElementById(id);

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Text with its fenced blocks of code set apart.
function fill(place, text) {
  place.replaceChildren(...text.split(/^```/m).map((piece, number) =>
    number % 2 ? element("pre", { tabIndex: 0 }, piece.replace(/^[^\n]*\n?/, "").replace(/\n$/, "")) : piece));
}

function drawTurn(turn, number) {
  const text = element("div", { className: "text" });
  fill(text, turn.content);
  const tools = element("div", { className: "tools" });
  if (turn.note) tools.append(element("span", { className: "note" }, turn.note));
  if (turn.role === "user") tools.append(element("button", { className: "edit-turn", onclick: () => edit(number) }, "Edit"));
  else tools.append(element("button", { className: "again", onclick: () => regenerate(number) }, "Regenerate"));
  if (turn.content && !turn.error) tools.append(element("button", { onclick: () => copy(turn.content) }, "Copy"));
  const drawn = element("article", { className: `turn ${turn.role}${turn.error ? " error" : ""}`, tabIndex: -1 }, text, tools);
  drawn.setAttribute("aria-label", turn.role === "user" ? "You" : "Model");
  return drawn;
}

function draw() {
  const turns = store.turns.map(drawTurn);
  $("chat").replaceChildren(...(turns.length ? turns : [element("p", { className: "empty" }, "Nothing has been said yet.")]));
  toEnd();
}

function toEnd() { $("chat").scrollTop = $("chat").scrollHeight; }

// Puts new text into the last turn; follows it only where the reader is at the end.
function grow(turn) {
  const chat = $("chat"), near = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 80;
  const last = chat.lastElementChild;
  last.classList.toggle("waiting", busy !== null);
  fill(last.querySelector(".text"), turn.content);
  if (near) toEnd();
}

function copy(text) { navigator.clipboard?.writeText(text); }

// A turn of the user's becomes a field; what is sent from it ends the conversation there and goes on from it.
function edit(number) {
  if (busy) return;
  const turn = $("chat").children[number], before = store.turns[number].content;
  const field = element("textarea", { className: "edit", value: before });
  field.setAttribute("aria-label", "Edit the message");
  const send = element("button", { onclick: () => { if (field.value.trim()) say(field.value, number); } }, "Send");
  const leave = element("button", { onclick: draw }, "Cancel");
  field.onkeydown = event => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send.click(); }
    if (event.key === "Escape") { event.stopPropagation(); leave.click(); }
  };
  turn.replaceChildren(field, element("div", { className: "tools" }, send, leave));
  field.focus();
}
