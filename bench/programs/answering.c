/* An endpoint that takes the place of the maker and only answers, so that it is never what bounds a contestant.
 *
 * In C, because it shares the machine's cores with those that are measured: on Python's asyncio with uvloop it takes
 * more than twice the CPU. POST /widgets answers 201, or 200 for an id that it has seen; GET /count how many ids that
 * were; any other GET when each came, as a JSON object of UTC seconds.
 */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <search.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST_IDS = 1 << 20, ID_SIZE = 36, MOST_CONNECTIONS = 1024, MOST_REQUEST = 16384 };

static struct widget { char id[ID_SIZE + 1]; double at; } *made;
static size_t count;
static struct { size_t size; char bytes[MOST_REQUEST + 1]; } received[MOST_CONNECTIONS];

static void give_up(const char *what)
{
    perror(what);
    exit(1);
}

static void send_all(int connection, const char *bytes, size_t size)
{
    while (size) {
        ssize_t sent = send(connection, bytes, size, MSG_NOSIGNAL);
        if (sent < 0)
            return; /* it has gone; its next read says so */
        bytes += sent;
        size -= sent;
    }
}

static void answer(int connection, const char *status, const char *content, size_t size)
{
    char head[160];
    int length = snprintf(head, sizeof head,
        "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n", status, size);
    if (size < 256) { /* one segment for both */
        char all[sizeof head + 256];
        memcpy(all, head, length);
        memcpy(all + length, content, size);
        send_all(connection, all, length + size);
    } else {
        send_all(connection, head, length);
        send_all(connection, content, size);
    }
}

static void make(int connection, const char *body)
{
    const char *key = strstr(body, "\"widget_id\""), *id = key ? strchr(key + strlen("\"widget_id\""), '"') : NULL;
    struct widget *widget = &made[count];
    if (!id || strlen(id) <= ID_SIZE || count == MOST_IDS - 1) {
        answer(connection, "422 Unprocessable Content", "{}", 2);
        return;
    }
    memcpy(widget->id, id + 1, ID_SIZE);
    ENTRY *known = hsearch((ENTRY){.key = widget->id, .data = widget}, ENTER);
    int is_new = known && known->data == widget;
    if (is_new) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        widget->at = now.tv_sec + now.tv_nsec / 1e9;
        count++;
    }
    char content[64];
    int size = snprintf(content, sizeof content, "{\"id\":\"%.*s\"}", ID_SIZE, id + 1);
    answer(connection, is_new ? "201 Created" : "200 OK", content, size);
}

static void tell(int connection, const char *path)
{
    if (!strncmp(path, "/count ", strlen("/count "))) {
        char content[24];
        answer(connection, "200 OK", content, snprintf(content, sizeof content, "%zu", count));
        return;
    }
    char *content = malloc(count * 72 + 3), *end = content;
    if (!content)
        give_up("memory");
    *end++ = '{';
    for (size_t index = 0; index < count; index++)
        end += sprintf(end, "%s\"%s\":%.6f", index ? "," : "", made[index].id, made[index].at);
    *end++ = '}';
    answer(connection, "200 OK", content, end - content);
    free(content);
}

/* Answers the first request, if it is whole: its size, else 0. */
static size_t serve(int connection, char *request)
{
    char *end = strstr(request, "\r\n\r\n"), *length = strcasestr(request, "\r\ncontent-length:");
    if (!end)
        return 0;
    char *body = end + 4;
    size_t body_size = length && length < end ? strtoul(length + strlen("\r\ncontent-length:"), NULL, 10) : 0;
    if (strlen(body) < body_size)
        return 0;
    char *path = strchr(request, ' ');
    char following = body[body_size];
    body[body_size] = 0;
    if (!strncmp(request, "POST ", 5))
        make(connection, body);
    else
        tell(connection, path ? path + 1 : "");
    body[body_size] = following;
    return body + body_size - request;
}

static void read_from(int connection)
{
    size_t size = received[connection].size, served;
    char *bytes = received[connection].bytes;
    ssize_t more = recv(connection, bytes + size, MOST_REQUEST - size, 0);
    if (more <= 0) {
        close(connection);
        return;
    }
    size += more;
    bytes[size] = 0;
    while (size && (served = serve(connection, bytes))) {
        size -= served;
        memmove(bytes, bytes + served, size + 1);
    }
    received[connection].size = size;
}

int main(void)
{
    int listener = socket(AF_INET, SOCK_STREAM, 0), poll = epoll_create1(0), yes = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event ready[64], wanted = {.events = EPOLLIN, .data.fd = listener};
    made = calloc(MOST_IDS, sizeof *made);
    address.sin_port = htons(atoi(getenv("BENCH_MAKER_PORT")));
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (!made || !hcreate(2 * MOST_IDS) || bind(listener, (struct sockaddr *)&address, sizeof address)
        || listen(listener, 128) || epoll_ctl(poll, EPOLL_CTL_ADD, listener, &wanted))
        give_up("answering");
    for (;;) {
        int found = epoll_wait(poll, ready, 64, -1);
        for (int index = 0; index < found; index++) {
            int connection = ready[index].data.fd;
            if (connection != listener) {
                read_from(connection);
                continue;
            }
            connection = accept(listener, NULL, NULL);
            if (connection < 0 || connection >= MOST_CONNECTIONS)
                give_up("accept");
            received[connection].size = 0;
            setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
            wanted.data.fd = connection;
            epoll_ctl(poll, EPOLL_CTL_ADD, connection, &wanted);
        }
    }
}
