// The official JavaScript client against the API: node openai_client.mjs CLIENT URL TOKEN; prints what it got as JSON.
const [client, url, token] = process.argv.slice(2)
const { default: OpenAI, toFile } = await import(client)
const { images, models } = new OpenAI({ baseURL: `${url}/v1`, apiKey: token, maxRetries: 0 })
const bytes = item => Buffer.from(item.b64_json, 'base64')
const kinds = async stream => { const all = []; for await (const event of stream) all.push(event.type); return all }
const refused = async call => { try { await call } catch (error) { return [error.status, error.param] } }

const prompt = 'a red apple', said = {}
said.model = (await models.retrieve('tiny_cascade')).id
const made = await images.generate({ prompt, response_format: 'b64_json', quality: 'auto', seed: 7 })
const picture = bytes(made.data[0]), file = () => toFile(picture, 'a.png', { type: 'image/png' })
said.made = picture.toString('base64')
said.edited = (await images.edit({ image: [await file()], prompt: 'a green apple', n: 2 })).data.length
said.varied = (await images.createVariation({ image: await file(), n: 2, size: '128x128' })).data.length
said.stream = await kinds(await images.generate({ prompt, stream: true, partial_images: 2 }))
said.edits = await kinds(await images.edit({ image: await file(), prompt, stream: true, partial_images: 1 }))
said.style = await refused(images.generate({ prompt, style: 'vivid' }))
said.broken = await refused(images.edit({ image: await toFile(Buffer.from('x'), 'a.png', { type: 'image/png' }), prompt }))
console.log(JSON.stringify(said))
