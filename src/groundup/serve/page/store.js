// Conversations in the browser's IndexedDB: small heads for the list, bodies with all that was said. Where the browser
// keeps nothing (some private windows), they live as long as the page, and the page says so.

const heads = new Map();
let database = null;
let onChange = () => {};
const channel = new BroadcastChannel("groundup-conversations");

const headOf = ({ id, title, created, updated }) => ({ id, title, created, updated });

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function openDatabase() {
  const request = indexedDB.open("groundup-chat", 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("heads", { keyPath: "id" });
    request.result.createObjectStore("bodies", { keyPath: "id" });
  };
  return finished(request);
}

const memory = new Map();

// Calls `changed()` whenever the list is another one, `deleted(id)` when another tab deletes. Returns whether
// conversations outlive the page.
export async function openStore(changed, deleted) {
  onChange = changed;
  try {
    database = await openDatabase();
    const stored = await finished(database.transaction("heads").objectStore("heads").getAll());
    for (const head of stored) heads.set(head.id, head);
  } catch {
    database = null;
  }
  channel.onmessage = ({ data }) => {
    if (data.head) heads.set(data.head.id, data.head);
    else {
      heads.delete(data.deleted);
      deleted(data.deleted);
    }
    onChange();
  };
  return database !== null;
}

// The newest first.
export const list = () => [...heads.values()].sort((a, b) => b.updated - a.updated);

export async function load(id) {
  if (!database) return structuredClone(memory.get(id));
  return finished(database.transaction("bodies").objectStore("bodies").get(id));
}

// Turns that another tab has added to the same conversation stay.
export async function save(conversation) {
  const body = structuredClone(conversation);
  if (database) {
    const transaction = database.transaction(["heads", "bodies"], "readwrite");
    const done = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
    const bodies = transaction.objectStore("bodies");
    const stored = await finished(bodies.get(body.id));
    if (stored) {
      body.nodes = { ...stored.nodes, ...body.nodes };
      body.pairs = { ...stored.pairs, ...body.pairs };
    }
    bodies.put(body);
    transaction.objectStore("heads").put(headOf(body));
    await done;
  } else memory.set(body.id, body);
  heads.set(body.id, headOf(body));
  channel.postMessage({ head: headOf(body) });
  onChange();
}

export async function remove(id) {
  heads.delete(id);
  onChange();
  channel.postMessage({ deleted: id });
  memory.delete(id);
  if (!database) return;
  const transaction = database.transaction(["heads", "bodies"], "readwrite");
  transaction.objectStore("heads").delete(id);
  await finished(transaction.objectStore("bodies").delete(id));
}

// Calls `visit(conversation)` for each; it returns false to end early.
export async function forEach(visit) {
  for (const { id } of list()) {
    const conversation = await load(id);
    if (conversation && visit(conversation) === false) return;
  }
}

// {id: the words around the first place where all words of the query's conversation are found}
export async function search(query, isCurrent) {
  const wanted = query.toLowerCase();
  const found = new Map();
  await forEach((conversation) => {
    if (conversation.title.toLowerCase().includes(wanted)) found.set(conversation.id, "");
    else {
      const place = firstMention(conversation, wanted);
      if (place !== null) found.set(conversation.id, place);
    }
    return isCurrent();
  });
  return found;
}

function firstMention(conversation, wanted) {
  for (const { content } of Object.values(conversation.nodes)) {
    const at = content.toLowerCase().indexOf(wanted);
    if (at >= 0) return `${at > 20 ? "…" : ""}${content.slice(Math.max(0, at - 20), at + 60).replace(/\s+/g, " ")}`;
  }
  return null;
}
