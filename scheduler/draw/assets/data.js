// The program, read from its words.  A node is a number: instruction i, or counter c as -1 - c.

const data = JSON.parse(document.getElementById("data").textContent);
const { records, counters, groups } = data;
const count = records.words.length;
const counterNode = (counter) => -1 - counter;

function word(i, name, offset = 0) {
  return records.words[i][data.word[name] + offset];
}

function kind(i) {
  return data.kinds[word(i, "OPCODE")];
}

function waits(i) {
  return d3.range(word(i, "WAITS")).map((j) => ({
    counter: word(i, "WAIT", j),
    target: word(i, "TARGET", j),
    lag: (word(i, "LAGS") >> j) & 1,
  }));
}

function loadWait(i) {
  const counter = word(i, "LOAD_WAIT");
  return counter < 0 ? null : { counter, target: word(i, "LOAD_TARGET"), lag: 1 };
}

function signals(i) {
  return d3.range(data.most.signals).map((j) => word(i, "SIGNAL", j)).filter((counter) => counter >= 0);
}

// Who signals and who waits for each counter, among the instructions that are drawn.
const producers = counters.map(() => []);
const readers = counters.map(() => []);
const queues = d3.range(data.sms).map(() => []);
for (let i = 0; i < count; i++) {
  for (const counter of signals(i)) producers[counter].push(i);
  for (const { counter, lag } of waits(i)) readers[counter].push({ i, lag });
  const awaited = loadWait(i);
  if (awaited) readers[awaited.counter].push({ i, lag: 1 });
  queues[records.sm[i]].push(i);
}
for (const queue of queues) queue.sort((a, b) => records.index[a] - records.index[b]);

const onPath = new Set(data.path);

// Edges within one token, as pairs of nodes.
const edges = [];
for (let i = 0; i < count; i++) {
  for (const counter of signals(i)) edges.push([i, counterNode(counter)]);
  for (const { counter, lag } of waits(i)) if (!lag) edges.push([counterNode(counter), i]);
}
