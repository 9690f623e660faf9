// Colours in code: comments, strings, numbers and the common words of common languages; no more than the eye needs.

const HASH = new Set(["py", "python", "sh", "bash", "shell", "zsh", "yaml", "yml", "toml", "ruby", "rb", "r", "perl", "makefile", "dockerfile"]);
const DASHES = new Set(["sql", "lua", "haskell", "hs"]);
const PLAIN = new Set(["", "text", "txt", "plain", "plaintext", "output", "console", "markdown", "md", "html", "xml"]);
const WORDS = new Set((
  "abstract and as assert async await begin bool boolean break case catch char class const continue def default defer del delete do done double elif else end enum " +
  "except export extends false False final finally float fn for from func function global goto if impl implements import in instanceof int interface is lambda let " +
  "long loop match mod module mut namespace new nil None nonlocal not null nullptr of or package pass private protected pub public raise ref return self short " +
  "static string struct super switch template then this throw trait true True try type typedef typeof union unsafe unsigned use using var virtual void where while with yield " +
  "SELECT FROM WHERE INSERT INTO UPDATE DELETE CREATE TABLE JOIN LEFT RIGHT INNER OUTER ON GROUP BY ORDER LIMIT VALUES SET AND OR NOT NULL AS DISTINCT HAVING").split(" "));
const REST = String.raw`|("""[^]*?"""|'''[^]*?'''|"(?:\\.|[^"\\\n])*(?:"|$)|'(?:\\.|[^'\\\n])*'|` + "`(?:\\\\.|[^`\\\\])*`" + String.raw`)|\b(\d[\w.]*)|\b([A-Za-z_]\w*)\b`;
const MOST_CHARACTERS = 10_000;

function pattern(language) {
  const comment = HASH.has(language) ? "#.*" : DASHES.has(language) ? "--.*" : String.raw`\/\/.*|\/\*[^]*?\*\/`;
  return new RegExp(`(${comment})${REST}`, "g");
}

export function highlight(code, language) {
  const text = code.textContent;
  if (PLAIN.has(language) || text.length > MOST_CHARACTERS) return;
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(pattern(language.toLowerCase()))) {
    const [all, comment, string, number, word] = match;
    const kind = comment ? "comment" : string ? "string" : number ? "number" : WORDS.has(word) ? "word" : null;
    if (!kind) continue;
    const span = document.createElement("span");
    span.className = `h-${kind}`;
    span.textContent = all;
    parts.push(text.slice(end, match.index), span);
    end = match.index + all.length;
  }
  code.replaceChildren(...parts, text.slice(end));
}
