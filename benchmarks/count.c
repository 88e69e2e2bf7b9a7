// A plugin of qemu-user that counts executed instructions, all of them, those on vectors and those that
// multiply integers, between marks: a mark is a system call of a number that no kernel has (MARK), whose
// argument is printed.
//
//     mark <argument> instructions <all> vector <those on vectors> products <those> <mnemonic> <count> ...
//
// Declarations are those of plugin API 1 (qemu 4.2 to 8.2), which Debian has no headers of. Counts are
// right for one thread. `benchmarks.counting` builds it and reads what it prints.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MARK = 5000, KINDS = 4096, SHOWN = 12, NAME = 16 };

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef struct qemu_info_t qemu_info_t;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
typedef void (*on_translation)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*on_call)(qemu_plugin_id_t, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                        uint64_t, uint64_t, uint64_t, uint64_t);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, on_translation);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t, on_call);
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn *, enum qemu_plugin_op, void *,
                                                uint64_t);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
char *qemu_plugin_insn_disas(const struct qemu_plugin_insn *);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

// A kind of instruction is its mnemonic, and whether an operand is a vector register.
static struct kind {
    char name[NAME];
    int is_vector;
    uint64_t count, before;
} kinds[KINDS];
static int used;

static uint64_t *counter_of(const char *text) {
    char name[NAME] = {0};
    if (strspn(text, "0123456789abcdef") == 8) text += 8 + strspn(text + 8, " \t");  // RISC-V's, its code
    for (int i = 0; i < NAME - 1 && text[i] && text[i] != ' ' && text[i] != '\t'; i++) name[i] = text[i];
    const char *operands = strpbrk(text, " \t");
    int is_vector = 0;
    for (const char *at = operands; at && *at; at++)
        is_vector |= strchr(" \t,{", at[0]) && strchr("vzqds", at[1] ? at[1] : ' ') && at[2] >= '0' &&
                     at[2] <= '9';
    for (int i = 0; i < used; i++)
        if (!strcmp(kinds[i].name, name) && kinds[i].is_vector == is_vector) return &kinds[i].count;
    if (used == KINDS) {
        fprintf(stderr, "count: more than %d kinds of instructions\n", KINDS);
        exit(1);
    }
    strcpy(kinds[used].name, name);
    kinds[used].is_vector = is_vector;
    return &kinds[used++].count;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *block) {
    (void)id;
    for (size_t i = 0; i < qemu_plugin_tb_n_insns(block); i++) {
        struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(block, i);
        char *text = qemu_plugin_insn_disas(instruction);
        qemu_plugin_register_vcpu_insn_exec_inline(instruction, QEMU_PLUGIN_INLINE_ADD_U64,
                                                   counter_of(text), 1);
        free(text);
    }
}

static int is_product(const struct kind *kind) {
    static const char *begins[] = {"mul", "mla", "mls", "smul", "smla", "umul", "umla", "madd", "msub"};
    for (size_t i = 0; i < sizeof begins / sizeof *begins; i++)
        if (!kind->is_vector && !strncmp(kind->name, begins[i], strlen(begins[i]))) return 1;
    return 0;
}

static int more(const void *a, const void *b) {
    const struct kind *x = a, *y = b;
    return (x->count < y->count) - (x->count > y->count);
}

static void called(qemu_plugin_id_t id, unsigned cpu, int64_t number, uint64_t argument, uint64_t b,
                   uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
    (void)id, (void)cpu, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
    if (number != MARK) return;
    static struct kind since[KINDS];
    uint64_t all = 0, vector = 0, products = 0;
    for (int i = 0; i < used; i++) {
        since[i] = kinds[i];
        since[i].count -= kinds[i].before;
        kinds[i].before = kinds[i].count;
        all += since[i].count;
        vector += since[i].is_vector ? since[i].count : 0;
        products += is_product(since + i) ? since[i].count : 0;
    }
    qsort(since, used, sizeof *since, more);
    fprintf(stderr, "mark %" PRIu64 " instructions %" PRIu64 " vector %" PRIu64 " products %" PRIu64, argument,
            all, vector, products);
    for (int i = 0; i < used && i < SHOWN && since[i].count; i++)
        fprintf(stderr, " %s %" PRIu64, since[i].name, since[i].count);
    fprintf(stderr, "\n");
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id,
                                                               const qemu_info_t *info, int argc,
                                                               char **argv) {
    (void)info, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}
