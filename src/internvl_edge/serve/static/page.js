// Uses the public routes and nothing else. What a model, a file or the server says reaches the page
// by textContent alone.
const $ = (id) => document.getElementById(id);
const TYPES = ["image/jpeg", "image/png", "image/webp"];
const MOST_BYTES = 14e6;
const state = { models: [], pictures: [], chosen: -1, talk: [], told: 0, stop: null };

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// --- the server ---------------------------------------------------------------------------------

async function call(path, content, signal) {
  const headers = {};
  const key = sessionStorage.getItem("key");
  if (key) headers.authorization = "Bearer " + key;
  if (content) headers["content-type"] = "application/json";
  const began = performance.now();
  let answer;
  try {
    answer = await fetch(path, { method: content ? "POST" : "GET", headers, body: content && JSON.stringify(content), signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not answer.");
  }
  if (answer.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw new Error(told?.error?.message ?? "The server answered " + answer.status + ".");
  }
  return { answer, began };
}

async function ask(path, content) {
  const { answer, began } = await call(path, content);
  const json = await answer.json();
  return { json, timing: answer.headers.get("server-timing"), took: performance.now() - began };
}

let hiding;
function notice(error) {
  if (error.name === "AbortError") return;
  $("notice").textContent = error.message;
  $("notice").hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => { $("notice").hidden = true; }, 9000);
}

// One after the other: a form that is busy takes no second click.
function on(form, work) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector(".primary") ?? form.querySelector("button");
    if (button.disabled) return;
    button.disabled = true;
    $("notice").hidden = true;
    try { await work(); } catch (error) { notice(error); } finally { button.disabled = false; }
  });
}

// --- pictures -----------------------------------------------------------------------------------

function asUrl(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

// What the server does not take, the browser may be able to show: then it is drawn anew.
async function readable(blob) {
  if (TYPES.includes(blob.type) && blob.size <= MOST_BYTES) return asUrl(blob);
  const bitmap = await createImageBitmap(blob).catch(() => null);
  if (!bitmap) throw new Error("This file is no picture that can be read here.");
  const scale = Math.min(1, 2048 / Math.max(bitmap.width, bitmap.height));
  const canvas = make("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.95);
}

async function add(blobs) {
  for (const blob of blobs) {
    try { state.pictures.push(await readable(blob)); } catch (error) { notice(error); continue; }
    choose(state.pictures.length - 1);
  }
}

function choose(i) {
  state.chosen = i;
  const url = state.pictures[i];
  $("preview").hidden = !url;
  $("hint").hidden = Boolean(url);
  $("drop").classList.toggle("full", Boolean(url));
  if (url) $("preview").src = url; else $("preview").removeAttribute("src");
  $("preview").alt = url ? "The chosen picture" : "";
  $("strip").replaceChildren(...state.pictures.map((picture, n) => {
    const item = make("li"), thumb = make("button", "thumb"), away = make("button", "drop-it", "×"), image = make("img");
    image.src = picture;
    image.alt = "Picture " + (n + 1);
    thumb.type = away.type = "button";
    thumb.setAttribute("aria-pressed", n === i);
    thumb.append(image);
    thumb.onclick = () => { choose(n); $("strip").children[n].firstChild.focus(); };
    away.setAttribute("aria-label", "Remove picture " + (n + 1));
    away.onclick = () => {
      state.pictures.splice(n, 1);
      if (n < state.told) state.told -= 1;
      choose(Math.min(state.chosen - (n < state.chosen), state.pictures.length - 1));
    };
    item.append(thumb, away);
    return item;
  }));
}

function picture() {
  if (state.chosen < 0) throw new Error("Choose a picture first.");
  return state.pictures[state.chosen];
}

const pixels = (image) => image.classList.toggle("tiny", image.naturalWidth < 128);
$("preview").onload = () => pixels($("preview"));
$("file").onchange = (event) => { add([...event.target.files]); event.target.value = ""; };
addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
addEventListener("dragleave", () => $("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  add([...event.dataTransfer.files]);
});
addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) { event.preventDefault(); add(files); }
});

// --- time ---------------------------------------------------------------------------------------

function timed(timing, took, rest = "network, rest") {
  const stages = (timing ?? "").split(",").map((part) => part.trim().split(";dur="))
    .filter(([name, ms]) => name && name !== "total" && Number(ms) >= 0).map(([name, ms]) => [name, Number(ms)]);
  const counted = stages.reduce((sum, [, ms]) => sum + ms, 0);
  stages.push(["rest", Math.max(0, took - counted)]);
  const whole = Math.max(took, counted);
  const box = make("div", "time"), bar = make("div", "stages");
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", "Stages of " + took.toFixed(1) + " ms");
  const keys = stages.map(([name, ms]) => {
    const kind = "s-" + (name === "rest" && rest.startsWith("answer") ? "decoder" : name);
    const part = make("i", kind), key = make("span", "key"), dot = make("i", kind);
    part.style.width = (100 * ms) / whole + "%";
    bar.append(part);
    key.append(dot, (name === "rest" ? rest : name.replace("_", " ")) + " " + ms.toFixed(1));
    return key;
  });
  box.append(bar, make("span", "key", "round trip " + took.toFixed(1) + " ms"), ...keys);
  return box;
}

// --- classify -----------------------------------------------------------------------------------

function panel(model, result, first) {
  const box = make("div", "panel"), title = make("h3", "", model.id), bars = make("ol", "bars");
  if (model.id !== model.internvl_edge.precision) title.append(make("span", "chip", model.internvl_edge.precision));
  const labels = result.json.data[0].labels;
  const before = first && new Map(first.map(({ label, score }) => [label, score]));
  for (const { label, score } of labels) {
    const item = make("li"), fill = make("div", "fill"), number = make("span", "num", (100 * score).toFixed(1) + " %"), name = make("b", "", label);
    fill.style.width = 100 * score + "%";
    item.dataset.label = label;
    item.dataset.score = score;
    const change = before ? 100 * (score - before.get(label)) : 0;
    if (Math.abs(change) >= 0.1) name.append(" ", make("span", "diff", (change > 0 ? "+" : "−") + Math.abs(change).toFixed(1)));
    item.append(fill, name, number);
    bars.append(item);
  }
  box.append(title);
  if (first && labels[0].label !== first[0].label) box.append(make("p", "diff", "another best label"));
  box.append(bars, timed(result.timing, result.took));
  return box;
}

on($("classify-form"), async () => {
  const labels = [...new Set($("labels").value.split(/[,\n]/).map((label) => label.trim()).filter(Boolean))];
  const content = { images: [picture()], labels, templates: [$("template").value] };
  let first = null;
  const panels = [];
  for (const model of state.models.filter(embeds)) {
    const result = await ask("/v1/classify", { ...content, model: model.id });
    panels.push(panel(model, result, first));
    first ??= result.json.data[0].labels;
  }
  $("panels").replaceChildren(...panels);
});

// --- ask ----------------------------------------------------------------------------------------

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

function say(role, text, pictures = []) {
  const said = make("div", "said " + role);
  for (const url of pictures) {
    const image = make("img");
    image.src = url;
    image.alt = "A picture that was sent";
    said.append(image);
  }
  said.append(text);
  $("log").append(said);
  $("log").scrollTop = $("log").scrollHeight;
  return said;
}

function forget() {
  state.talk = [];
  state.told = 0;
  $("log").replaceChildren();
  $("ask-time").replaceChildren();
}

on($("ask-form"), async () => {
  const model = state.models.find(({ id }) => id === $("speaker").value), text = $("question").value.trim();
  if (!text) return;
  const talks = model.internvl_edge.chat;
  // A chat model is sent each picture once, the others look at the chosen one.
  const pictures = talks ? state.pictures.slice(state.told) : [picture()];
  const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  const question = { role: "user", content: [...parts, { type: "text", text }] };
  const asked = say("user", text, pictures);
  $("question").value = "";
  const said = say("assistant", ""), words = document.createTextNode("");
  said.append(words);
  said.classList.add("busy");
  state.stop = new AbortController();
  $("stop").hidden = false;
  let usage, reason, answered;
  try {
    const messages = talks ? [...state.talk, question] : [question];
    const content = { model: model.id, messages, stream: true, stream_options: { include_usage: true } };
    const { answer, began } = await call("/v1/chat/completions", content, state.stop.signal);
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      words.data += choice?.delta.content ?? "";
      reason = choice?.finish_reason ?? reason;
      usage = event.usage ?? usage;
      $("log").scrollTop = $("log").scrollHeight;
    }
    answered = true;
    const took = performance.now() - began;
    if (usage) said.append(make("span", "note", usage.completion_tokens + " tokens" + (reason === "length" ? ", cut off" : "")));
    $("ask-time").replaceChildren(timed(answer.headers.get("server-timing"), took, "answer, network"));
  } finally {
    $("stop").hidden = true;
    said.classList.remove("busy");
    if (answered || words.data) {
      state.talk.push(question, { role: "assistant", content: words.data });
      if (talks) state.told += pictures.length;
    } else { // as if it had not been asked
      said.remove();
      asked.remove();
      $("question").value ||= text;
    }
  }
});

$("stop").onclick = () => state.stop?.abort();
$("new").onclick = () => { forget(); $("question").focus(); };
$("speaker").onchange = forget;
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask-form").requestSubmit(); }
};

// --- gallery ------------------------------------------------------------------------------------

async function small(number) {
  const { answer } = await call("/gallery/" + number + ".jpg");
  return answer.blob();
}

async function search(content) {
  const result = await ask("/gallery/search", { ...content, model: $("finder").value });
  const hits = await Promise.all(result.json.data.map(async ({ index, score }) => {
    const item = make("li"), button = make("button"), image = make("img"), blob = await small(index);
    image.src = URL.createObjectURL(blob);
    image.onload = () => { pixels(image); URL.revokeObjectURL(image.src); };
    image.alt = "Picture " + index + " of the gallery";
    button.type = "button";
    button.title = "Take this picture";
    button.onclick = async () => { await add([blob]); scrollTo({ top: 0, behavior: "smooth" }); };
    button.append(image, make("span", "num", score.toFixed(3)));
    item.append(button);
    return item;
  }));
  $("hits").replaceChildren(...hits);
  $("search-time").replaceChildren(timed(result.timing, result.took));
}

on($("search-form"), () => search({ text: $("query").value }));
$("alike").onclick = async () => {
  try { await search({ image: picture() }); } catch (error) { notice(error); }
};

// --- start --------------------------------------------------------------------------------------

const has = (model, ...names) => names.every((name) => model.internvl_edge.components.includes(name));
const embeds = (model) => has(model, "text_embed") && (has(model, "image_embed") || has(model, "vision", "image_pool"));
const speaks = (model) => has(model, "decoder", "image_queries") || has(model, "chat_decoder");

function choices(select, models) {
  select.replaceChildren(...models.map(({ id }) => { const one = make("option", "", id); one.value = id; return one; }));
  select.hidden = models.length < 2;
}

async function start() {
  const { json } = await ask("/v1/models");
  state.models = json.data;
  $("models").textContent = json.data.map(({ id, internvl_edge: { precision } }) => (id === precision ? id : id + " (" + precision + ")")).join(" · ");
  const embedding = json.data.filter(embeds), speaking = json.data.filter(speaks);
  $("classify").hidden = !embedding.length;
  $("ask").hidden = !speaking.length;
  $("classify").classList.toggle("lone", !speaking.length);
  $("ask").classList.toggle("lone", !embedding.length);
  choices($("speaker"), speaking);
  choices($("finder"), embedding);
  const { json: { count } } = await ask("/gallery");
  $("gallery").hidden = !count || !embedding.length;
  $("count").textContent = count + (count === 1 ? " picture" : " pictures");
  document.body.dataset.ready = "yes";
}

on($("key-form"), async () => {
  sessionStorage.setItem("key", $("key").value.trim());
  await start();
  $("key").value = "";
  $("key-form").hidden = true;
});

start().catch(notice);
