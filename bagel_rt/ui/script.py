"""JavaScript of the page."""

from bagel_rt.ui.uploads import MAX_UPLOAD

SCRIPT = (
    f"const MAX_UPLOAD = {MAX_UPLOAD};"
    """
// Ctrl+Enter runs the request of the tab that has the focus; Cmd+Enter on a Mac.
document.addEventListener("keydown", event => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.repeat) return;
  const button = event.target.closest(".task, .chat")?.querySelector(".run, .submit-button");
  if (!button || button.disabled) return;
  event.preventDefault();
  event.stopPropagation();
  button.click();
}, true);

// Show an image that is smaller than its box at the largest integer scale, in pixels of the screen, without smoothing.
const fit = image => {
  const screen = window.devicePixelRatio, width = image.naturalWidth, height = image.naturalHeight;
  const box = {width: image.clientWidth * screen, height: image.clientHeight * screen};
  const scale = Math.floor(Math.min(box.width / width, box.height / height));
  if (!(scale >= 1) || !Number.isFinite(scale)) {
    image.style.padding = image.style.imageRendering = "";
    return;
  }
  const left = Math.floor((box.width - scale * width) / 2), top = Math.floor((box.height - scale * height) / 2);
  const sides = [top, box.width - scale * width - left, box.height - scale * height - top, left];
  image.style.padding = sides.map(side => `${side / screen}px`).join(" ");
  image.style.imageRendering = "pixelated";
};
const boxes = new ResizeObserver(entries => entries.forEach(entry => fit(entry.target)));
document.addEventListener("load", event => {
  if (!event.target.matches?.(".sharp img")) return;
  boxes.observe(event.target, {box: "border-box"});
  fit(event.target);
}, true);

// Refuse files that are too large before they are sent: the server's refusal does not say why.
const checkSize = (event, files) => {
  const large = [...files ?? []].find(file => file.size > MAX_UPLOAD);
  if (!large) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  if (event.target.type === "file") event.target.value = "";
  const line = event.target.closest(".task, .chat")?.querySelector(".status");
  if (!line) return;
  const size = (large.size / 2 ** 20).toFixed(1), words = document.createElement("span");
  words.className = "message";
  words.textContent = `${large.name} must have at most ${MAX_UPLOAD >> 20} MB, got ${size} MB. Reduce the image.`;
  line.dataset.stage = "failed";
  line.setAttribute("role", "alert");
  line.replaceChildren(words);
};
document.addEventListener("change", event => checkSize(event, event.target.files), true);
document.addEventListener("drop", event => checkSize(event, event.dataTransfer?.files), true);
document.addEventListener("paste", event => checkSize(event, event.clipboardData?.files), true);
"""
)
