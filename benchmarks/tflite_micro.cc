// A network as `benchmarks.exporters` has TensorFlow Lite for Microcontrollers interpret it, behind the
// functions that `bare.c` calls. The last four bytes of its output are those of the arena that it uses.
#include <cstring>

#include "tensorflow/lite/micro/micro_interpreter.h"
#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"
#include "tensorflow/lite/schema/schema_generated.h"

extern "C" {
#include "net.h"
extern const unsigned char net_model[];
void net_begin(void);
}

static uint8_t arena[ARENA] __attribute__((aligned(16)));
static tflite::MicroInterpreter *interpreter;

void net_begin(void)
{
    static tflite::MicroMutableOpResolver<OPERATORS> operators;
    ADD_OPERATORS
    static tflite::MicroInterpreter made(tflite::GetModel(net_model), operators, arena, sizeof arena);
    if (made.AllocateTensors() != kTfLiteOk)
        __builtin_trap();
    interpreter = &made;
}

void net_run(const int8_t *x, int8_t *y)
{
    uint32_t used = interpreter->arena_used_bytes();
    memcpy(interpreter->input(0)->data.int8, x, NET_X_SIZE);
    if (interpreter->Invoke() != kTfLiteOk)
        __builtin_trap();
    memcpy(y, interpreter->output(0)->data.int8, NET_Y_SIZE - sizeof used);
    memcpy(y + NET_Y_SIZE - sizeof used, &used, sizeof used);
}
