"""A double of Rackspace's identity service: whoever signs in finds Cloud Queues at this Zaqar's API v1.

identity.py PORT ZAQAR_PORT
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENDPOINT = {"region": "DFW", "tenantId": "1", "publicURL": f"http://127.0.0.1:{sys.argv[2]}/v1"}
ACCESS = {
    "token": {"id": "token", "expires": "2099-12-01T00:00:00.000Z", "tenant": {"id": "1", "name": "1"}},
    "user": {"id": "7", "name": "tester", "roles": [], "RAX-AUTH:defaultRegion": "DFW"},
    "serviceCatalog": [{"name": "cloudQueues", "type": "rax:queues", "endpoints": [ENDPOINT]}],
}


class Identity(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"access": ACCESS}).encode())


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Identity).serve_forever()
