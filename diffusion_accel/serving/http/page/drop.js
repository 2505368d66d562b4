// The place where an image is dropped, or chosen: its bytes go to the server as base64, for their settings alone.
const largest = 16 * 2 ** 20; // bytes; memory.py says the same

function take(file) {
  if (!file) return;
  if (file.size > largest) {
    props.value = "too large";
    trigger("submit");
    return;
  }
  const reader = new FileReader();
  reader.onload = () => {
    props.value = reader.result.slice(reader.result.indexOf(",") + 1);
    trigger("submit");
  };
  reader.readAsDataURL(file);
}

element.addEventListener("change", (event) => {
  take(event.target.files[0]);
  event.target.value = "";
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  element.addEventListener(kind, (event) => {
    event.preventDefault();
    element.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files[0]);
  });
}
