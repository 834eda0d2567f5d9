// Classify an image with a deployment, in each precision: node transformers_js.mjs NODE_MODULES FOLDER IMAGE
import path from "node:path";
import { pathToFileURL } from "node:url";

const [modules, folder, image] = process.argv.slice(2);
const library = path.join(modules, "@huggingface/transformers/dist/transformers.node.mjs");
const { env, pipeline } = await import(pathToFileURL(library));
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const answers = {};
for (const dtype of ["fp32", "fp16", "q8"]) {
  const classify = await pipeline("image-classification", path.basename(folder), { dtype, device: "cpu" });
  answers[dtype] = await classify(image, { top_k: null });
}
console.log(JSON.stringify(answers));
