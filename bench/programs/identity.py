"""A double of Rackspace's identity service: whoever signs in finds Cloud Queues at this Zaqar's API v1.

identity.py PORT ZAQAR_PORT
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT, ZAQAR_PORT = map(int, sys.argv[1:])
ENDPOINT = {"region": "DFW", "tenantId": "1", "publicURL": f"http://127.0.0.1:{ZAQAR_PORT}/v1"}
ACCESS = {
    "token": {"id": "token", "expires": "2099-12-01T00:00:00.000Z", "tenant": {"id": "1", "name": "1"}},
    "user": {"id": "7", "name": "tester", "roles": [], "RAX-AUTH:defaultRegion": "DFW"},
    "serviceCatalog": [{"name": "cloudQueues", "type": "rax:queues", "endpoints": [ENDPOINT]}],
}


class Identity(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        content = json.dumps({"access": ACCESS}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


ThreadingHTTPServer(("127.0.0.1", PORT), Identity).serve_forever()
