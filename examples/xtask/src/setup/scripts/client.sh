# Talks to its peer: one ping each way, a connection to a closed port, then pages and pings without end.
guest-tool ping "$PEER4" "$PEER6"
guest-tool closed "$PEER4" 81
guest-tool fetch "$PEER6" &
guest-tool fetches "$PEER4" &
guest-tool gaps "$PEER4" &
