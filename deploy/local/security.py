"""The secure stack's certificates, passwords and files of secrets, and which program has which.

`up --secure` makes them in the stack's directory `secure/`, which its owner alone may read. An authority of
the stack's own signs the certificates, and nobody keeps its key.
"""

import datetime
import ipaddress
import secrets
from pathlib import Path

from deploy.local.database_users import USERS
from deploy.local.files import write_whole
from deploy.local.ports import HOST
from deploy.local.state import StackState
from services.common.operations.acls import PROGRAMS

__all__ = [
    "ADMINISTRATOR",
    "BROKER",
    "OPERATORS_SECRETS",
    "SERVER",
    "administrator_config",
    "authority",
    "certificate",
    "database_url",
    "kafka_settings",
    "make_certificates",
    "make_passwords",
    "secret_files",
]

BROKER, ADMINISTRATOR, SERVER = "postroad-kafka", "postroad-admin", "postroad-mysql"
"""The common names of the certificates. The first two are Kafka's superusers."""
OPERATORS_SECRETS = ("POSTROAD_DATABASE_URL", "POSTROAD_KAFKA_SASL_PASSWORD")
"""The variables of the secrets that stack.env has, for an operator."""
_DAYS = 3650


def make_passwords() -> dict[str, str]:
    """Return a new password for each principal of Kafka and each user of the database."""
    names = [*(f"kafka-{program}" for program in (*PROGRAMS, "admin")), *(f"mysql-{user}" for user in USERS)]
    return {name: secrets.token_hex(16) for name in names}


def authority(state: StackState) -> Path:
    """Return the path of the authority's certificate."""
    return Path(state.secure) / "ca.pem"


def certificate(state: StackState, name: str) -> Path:
    """Return the path of a file that holds a certificate and its private key."""
    return Path(state.secure) / f"{name}.pem"


def kafka_settings(state: StackState, program: str) -> dict[str, str]:
    """Return the settings with which a program of PROGRAMS connects to Kafka, without its password."""
    return {
        "POSTROAD_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "POSTROAD_KAFKA_SASL_USERNAME": f"postroad-{program}",
        "POSTROAD_KAFKA_SSL_CA": str(authority(state)),
    }


def database_url(state: StackState, user: str) -> str:
    """Return the URL with which a user of USERS connects to the database."""
    return (
        f"mysql+mysqlconnector://postroad_{user}:{state.passwords[f'mysql-{user}']}@{HOST}"
        f":{state.port('mysql', 'sql')}/postroad?charset=utf8mb4&collation=utf8mb4_general_ci"
        f"&ssl_ca={authority(state)}&ssl_verify_identity=true"
    )


def secret_files(state: StackState, service: str) -> dict[str, str]:
    """Return the variables of a service's secrets in files, and write the files."""
    found = {"POSTROAD_KAFKA_SASL_PASSWORD_FILE": state.passwords[f"kafka-{service}"]}
    if service in USERS:
        found["POSTROAD_DATABASE_URL_FILE"] = database_url(state, service)
    files = {}
    for variable, secret in found.items():
        kind = "kafka" if "KAFKA" in variable else "database"
        path = Path(state.secure) / f"{service}.{kind}"
        if not path.exists() or path.read_text() != f"{secret}\n":
            write_whole(path, f"{secret}\n")
        files[variable] = str(path)
    return files


def administrator_config(state: StackState, *nodes: str) -> dict[str, str | int | float | bool]:
    """Return librdkafka's settings of the administrator, who reaches these nodes by a certificate.

    Without `nodes` it reaches all.
    """
    pair = str(certificate(state, ADMINISTRATOR))
    addresses = (f"{HOST}:{state.port(name, 'internal')}" for name in nodes or state.kafka_names())
    return {
        "bootstrap.servers": ",".join(addresses),
        "security.protocol": "ssl",
        "ssl.ca.location": str(authority(state)),
        "ssl.certificate.location": pair,
        "ssl.key.location": pair,
    }


def make_certificates(state: StackState) -> None:
    """Make the authority and the certificates, unless they exist."""
    root = Path(state.secure)
    if authority(state).exists():
        return
    # The import is slow, and only this needs it.
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    def named(common_name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])

    def draft(common_name: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(named(common_name))
            .issuer_name(named("postroad-authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=_DAYS))
        )

    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    signer = ec.generate_private_key(ec.SECP256R1())
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))]
    for name in (BROKER, ADMINISTRATOR, SERVER):
        key = ec.generate_private_key(ec.SECP256R1())
        signed = (
            draft(name, key)
            .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
            )
            .sign(signer, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_whole(
            certificate(state, name), (private + signed.public_bytes(serialization.Encoding.PEM)).decode()
        )
    issued = (
        draft("postroad-authority", signer)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    # The last file: a directory that has it is complete.
    write_whole(authority(state), issued.public_bytes(serialization.Encoding.PEM).decode())
