"""A deployment of polyrank over Flower: what server and clients run, and keys, processes and runs around it.

server         the server's Flower app
client         a client's Flower app
site           how a client answers
site_file      a client's file: what it is made of, and what it allows
holdings       what it has: data, and the model and data as a server wants them
consent        which runs it takes part in
policy         what may be asked of it
ledger         what its answers have told of its data
document       a JSON file that several processes change
check          a look at all of that before anybody is dialled
keeper         keeps a site's model loaded
certificates   the authority, the server's certificate, a key pair a node, signatures
layout         what lies where in a deployment's folder and in a node's, and in what environment Flower runs
templates      the text files that `provision` writes
provision      a deployment's folder: init, add
renewal        the server's certificate and the authority, anew
enrolment      a site's request and the server's answer, as files
identity       a site's folder: its key, its request, the answer
registry       who may take part, until when; which keys never again
registrar      makes Flower's SuperLink be as the registry says
expiry         what ends when
supervise      keeps processes running, in the background; the standard library alone
control        Flower's command line, as functions
operate        the server: up, register, remove, status, down
join           a node
follow         a run: submit, follow, submit again
metrics        what Prometheus is told of a server; alerts.yaml has the alerts
exposition     the text format of metrics
backup         a server's folder in one file, and back
"""
