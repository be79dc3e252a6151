# The curl lines of vLLM's guides, with another model. Arguments: the server's URL.
set -eu
url=$1
curl -sf "$url/health"
curl -sf "$url/v1/models" | grep -q '"id":"demo"'
curl -sf "$url/v1/completions" \
    -H "Content-Type: application/json" \
    -d '{
        "model": "demo",
        "prompt": "San Francisco is a",
        "max_tokens": 7,
        "temperature": 0
    }' | grep -q '"object":"text_completion"'
curl -sf "$url/v1/chat/completions" \
    -H "Content-Type: application/json" \
    -d '{
        "model": "demo",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Who won the world series in 2020?"}
        ],
        "max_tokens": 7
    }' | grep -q '"object":"chat.completion"'
curl -sfN "$url/v1/completions" -H "Content-Type: application/json" -H "Authorization: Bearer token-abc123" \
    -d '{"model": "demo", "prompt": "Once", "max_tokens": 5, "stream": true}' | grep -qx 'data: \[DONE\]'
curl -sf "$url/metrics" | grep -q '^vllm:num_requests_running{'
curl -sf "$url/version" | grep -q '"version"'
echo ok
